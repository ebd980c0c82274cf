"""Muon on divided matrices against Muon in one process; planted faults."""

import pytest
import runs
from test_contract import LAYOUTS, LOSS, NORM, held

MUON = {"optimizer": "muon", "lr": 5e-4}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_matrices_are_made_orthogonal_as_a_whole(layout, text, plain, tmp_path):
    config = runs.tiny()
    held(plain, runs.settings_of(text, tmp_path / "run", config, **MUON, **LAYOUTS[layout]), config, **MUON)


def test_experts_that_are_divided_inside(text, plain, tmp_path):
    """Three experts on each of two groups of two processes: FSDP divides the inner dimension of each."""
    config = runs.tiny(num_experts=6)
    held(plain, runs.settings_of(text, tmp_path / "run", config, **MUON, **LAYOUTS["fsdp-ep"]), config, **MUON)


@pytest.mark.parametrize("fault", ["muon of parts", "gate and up together"])
def test_matrices_that_are_not_the_plain_loops_are_noticed(fault, text, plain, tmp_path):
    """Planted: each process makes its own rows orthogonal; an expert's gate and up are one matrix. No error shows."""
    config = runs.tiny()
    settings = runs.settings_of(text, tmp_path / "run", config, **MUON, **LAYOUTS["fsdp"])
    runs.titan(settings, planted=fault)
    loss, norm = runs.differences(runs.rows(settings.out), plain(config, **MUON))
    print(fault, loss, norm)
    assert loss > 5 * LOSS
    assert norm > 5 * NORM


def test_projections_that_stay_one_parameter(text, plain, tmp_path):
    """A variant of Gated DeltaNet is not stored in pieces: q, k and v are rows of one parameter, each a matrix."""
    config = runs.tiny(linear_negative_eigenvalues=True)
    held(plain, runs.settings_of(text, tmp_path / "run", config, **MUON, **LAYOUTS["fsdp"]), config, **MUON)
