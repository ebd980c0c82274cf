"""`make test-titan` runs these in an environment of their own; `make test` leaves them out."""

import dataclasses
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import cpu  # noqa: F401  before torchtitan
import runs


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    return runs.corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def plain(tmp_path_factory, text):
    """Losses and norms of the same settings in one plain process, computed once for each."""
    found = {}

    def rows(config, **changes):
        key = repr((config, sorted(changes.items())))
        if key not in found:
            out = tmp_path_factory.mktemp("plain") / "run"
            found[key] = runs.Plain(runs.settings_of(changes.pop("data", text), out, config, **changes)).to(runs.STEPS)
        return found[key]

    return rows


@pytest.fixture(scope="session")
def finished(tmp_path_factory, text):
    """A finished run on two processes with FSDP2, whose step 5 is kept too."""
    out = tmp_path_factory.mktemp("finished") / "run"
    settings = runs.settings_of(text, out, runs.tiny(), processes=2)
    runs.titan(settings)
    return dataclasses.replace(settings, processes=0)
