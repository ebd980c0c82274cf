"""Context extension: parity with transformers' YaRN, errors, warnings."""

import json
import warnings

import pytest
import torch
from conftest import small_config, small_model
from parity import tokens
from test_families import make, quietly_load

import qwen3next as q
from layers.rope import Yarn, inverse_frequencies

pytestmark = pytest.mark.oracle

transformers = pytest.importorskip("transformers")

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SPELT = [
    {},
    {"factor": 8.0, "beta_fast": 16.0, "beta_slow": 2.0},
    {"attention_factor": 0.9},
    {"mscale": 1.0, "mscale_all_dim": 0.5},
    {"truncate": False},
]


@pytest.mark.parametrize("changes", SPELT, ids=str)
@pytest.mark.parametrize("kind", ["qwen3_5_text", "qwen3"])
def test_logits_and_config(tmp_path, kind, changes):
    base = {"rope_theta": 10_000.0} | ({"partial_rotary_factor": 0.5} if kind == "qwen3_5_text" else {})
    their = make(kind, rope_parameters=base | YARN | changes)
    their.save_pretrained(tmp_path / "a")
    ours = quietly_load(tmp_path / "a")
    with torch.no_grad():
        assert (ours(tokens(150)).logits - their(tokens(150)).logits).abs().max() <= 1e-5
    ours.save_pretrained(tmp_path / "b")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype="float32").eval()
    with torch.no_grad():
        # mscale is written as the equivalent attention factor.
        assert (again(tokens(150)).logits - their(tokens(150)).logits).abs().max() <= 1e-6
    assert quietly_load(tmp_path / "b").config.rope_scaling == ours.config.rope_scaling


def test_as_the_released_instructions_have_it(tmp_path):
    """rope_scaling beside rope_theta in a qwen3_next config.json, with "type" or "rope_type"."""
    small_model(mtp_num_hidden_layers=0, initializer_range=0.02).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for key in ("rope_type", "type"):
        scaling = {key: "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
        (tmp_path / "config.json").write_text(json.dumps(values | {"rope_scaling": scaling}))
        their = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32").eval()
        with torch.no_grad():
            assert (quietly_load(tmp_path)(tokens(150)).logits - their(tokens(150)).logits).abs().max() <= 1e-5
        assert q.ModelConfig.load(tmp_path).to_dict()["rope_scaling"]["factor"] == 4.0


def test_frequencies_of_the_released_model():
    """High frequencies are kept, low ones divided by the factor, with a ramp in between; independent of the code."""
    yarn = Yarn(factor=4.0, original_max_position_embeddings=262_144)
    plain, stretched = inverse_frequencies(64, 1e7), inverse_frequencies(64, 1e7, yarn=yarn)
    turns = 262_144 * plain / (2 * torch.pi)
    ratio = plain / stretched
    assert (ratio[turns > 40] == 1).all()
    assert torch.allclose(ratio[turns < 0.6], torch.tensor(4.0, dtype=torch.float64))
    assert (ratio.diff() >= -1e-6).all()
    assert yarn.magnitude == pytest.approx(0.1 * torch.log(torch.tensor(4.0)).item() + 1)


def test_a_factor_for_a_run():
    model = small_model(max_position_embeddings=32)
    plain = model(tokens(30)).logits
    old = model.new_cache(batch=2)
    model.extend_context(4.0)
    assert model.config.longest_context == 128
    assert not torch.allclose(model(tokens(30)).logits, plain)
    with pytest.raises(ValueError, match="another RoPE scaling"):
        model(tokens(30), cache=old)
    cache = model.new_cache(batch=2, max_len=60)
    with torch.no_grad():
        whole = model(tokens(60)).logits
        parts = [model(tokens(60)[:, a:b], cache=cache).logits for a, b in ((0, 40), (40, 41), (41, 60))]
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-4
    model.extend_context(1.0)
    assert torch.equal(model(tokens(30)).logits, plain)


def test_positions_beyond_training_warn_once():
    model = small_model(max_position_embeddings=32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(tokens(32))
    with pytest.warns(UserWarning, match="Positions up to 33 lie beyond the 32"):
        model(tokens(33))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(tokens(40))
    model.extend_context(2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(tokens(64))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"factor": 0.5}, "must be at least 1"),
        ({"factor": "4"}, "factor cannot be"),
        ({"original_max_position_embeddings": 1.5}, "original_max_position_embeddings cannot be"),
        ({"beta_fast": 1.0}, "beta_slow"),
        ({"rope_type": "longrope"}, "'longrope' RoPE"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_wrong_scalings_are_refused(change, sentence):
    values = small_config().to_dict() | {"rope_scaling": YARN | change}
    with pytest.raises(ValueError, match=sentence):
        q.ModelConfig.from_dict(values)
