"""Every compiled function with valid, unusual and wrong arguments; `make test-sanitize` runs more, with sanitizers."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from native_fuzz import ENTRIES, Random, wrong

from layers.cpp import build, ops
from layers.cpp.operands import address, operand
from layers.cpp.signatures import ARGUMENTS

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=f"compiled code cannot run: {build.missing()}")


def test_it_answers_or_raises_and_never_strays():
    """In a separate process, which an invalid access would end; results do not depend on the memory layout."""
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(Path(__file__).parents[1] / "native_fuzz.py"), "6000"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, (done.stdout + done.stderr)[-2000:])


def test_every_exported_function_is_declared():
    """A function without declared arguments would accept anything that Python passes."""
    assert isinstance(build.library(), ctypes.CDLL)
    found = subprocess.run(["nm", "-D", "--defined-only", build.library()._name], capture_output=True, text=True)
    exported = {line.split()[-1] for line in found.stdout.splitlines() if " T " in line}
    assert {name for name in exported if not name.startswith("_")} == set(ARGUMENTS)


@pytest.mark.parametrize("name", sorted(set(ENTRIES) - {"replay"}))
def test_a_refusal_names_operation_and_argument(name):
    run, make = ENTRIES[name]
    arguments = make(Random(3))
    first = next(iter(arguments))
    arguments[first] = arguments[first].to(torch.float16)
    with pytest.raises(ValueError, match=f"{first} must be "):
        run(*arguments.values())


def test_memory_that_is_gone_is_refused():
    x = torch.ones(4, 8)
    x.untyped_storage().resize_(16)
    with pytest.raises(ValueError, match="16 bytes of memory, fewer than its numbers need"):
        ops.silu_fp32(x)
    x = torch.ones(4, 8)
    turned = x.T
    x.untyped_storage().resize_(16)
    with pytest.raises(ValueError, match="fewer than its numbers need"):
        address(turned)
    with pytest.raises(ValueError, match="fewer than its numbers need"):
        operand("x", turned, (8, 4), torch.float32)


@pytest.mark.parametrize("inverse", [[[0, 1], [2, 2]], [[0, 1], [2, 4]], [[0, 1], [2, -1]], [[0, 1]]])
def test_places_name_every_row_once(inverse):
    inverse = torch.tensor(inverse)
    out, weights = torch.ones(4, 3), torch.ones(inverse.shape)
    with pytest.raises(ValueError, match="each of the 4 rows of out once"):
        ops.combine(out, weights, inverse, False)
    with pytest.raises(ValueError, match="each of the 4 rows of out once"):
        ops.combine_backward(out, weights, inverse, torch.ones(len(inverse), 3))


def test_wrong_is_something_else():
    """Most arguments that the fuzzer creates differ from the valid ones."""
    r, x = Random(0), torch.arange(12.0).view(3, 4)
    different = 0
    for _ in range(100):
        y = wrong(r, x)
        alike = isinstance(y, torch.Tensor) and (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
        different += not alike
    assert different > 60
