"""`fold`: the state after some tokens of the last call, from the state before it."""

import pytest
import torch
from native_fuzz import Random, fold_one, folded

from layers.cpp import build

pytestmark = pytest.mark.skipif(build.missing() is not None, reason="there are no C++ kernels here")


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", ["conv", "state", "inputs", "keys", "writes", "decay"])
def test_the_memory_layout_of_what_it_reads_changes_nothing(seed, name):
    arguments = folded(Random(seed))
    expected = fold_one(*arguments.values())
    arguments[name] = arguments[name].mT.contiguous().mT
    for got, right in zip(fold_one(*arguments.values()), expected, strict=True):
        assert all(map(torch.equal, got, right))
