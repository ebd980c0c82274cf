"""A step and a whole page by torch.export; a step as a package of AOTInductor.

Each case runs this file in a separate process, because torch cannot trace the shape checks that conftest.py puts around
every function.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qwen3next as q
from layers.segments import Segments
from qwen3next.decoding.exportable import ExportableStep, plain

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "export.md"
PLACES = 64


def model(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "full_attention_interval": 2, "initializer_range": 0.1}
    return q.Qwen3Next(q.presets.tiny(**sizes | changes)).to(dtype).eval()


@torch.no_grad()
def prepared(whole, lengths=(20, 7)):
    """A step, a cache of rows of unequal lengths, and the step's tensors."""
    ids = torch.arange(40).view(2, 20) * 7 % 251
    cache = whole.new_cache(batch=2, max_len=PLACES)
    whole(ids, segments=Segments.from_mask(torch.arange(20) < torch.tensor(lengths)[:, None]), cache=cache)
    step = ExportableStep(whole)
    return step, cache, *step.states(cache, PLACES)


@torch.no_grad()
def follows(run, whole, cache, position, states, tolerance) -> None:
    """Three steps give the logits and states of `model.step`."""
    for token in (5, 9, 77):
        ids = torch.tensor([[token], [token + 1]])
        assert (run(ids, position, *states) - whole.step(ids, cache)).abs().max() <= tolerance
        position = position + 1
    _, expected = ExportableStep(whole).states(cache, states[-1].shape[2])
    for got, state in zip(states, expected, strict=True):
        assert (got - state).abs().max() <= tolerance


@torch.no_grad()
def exported(kind: str) -> None:
    """A program whose number of places is dynamic, by the default backends or by torch's operators alone."""
    whole = model()
    if kind == "plain":
        plain(whole)
    step, cache, position, states = prepared(whole)
    ids = torch.tensor([[5], [6]])
    shapes = (None, None, step.dynamic_places(states))
    program = torch.export.export(step, (ids, position, *(x.clone() for x in states)), dynamic_shapes=shapes)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    ours = {name for name in called if "qwen3next" in name}
    assert bool(ours) == (kind != "plain"), ours
    follows(program.module(), whole, cache, position, states, 1e-5)
    step, cache, position, _ = prepared(whole)
    follows(program.module(), whole, cache, position, step.states(cache, 100)[1], 1e-5)


@torch.no_grad()
def compiled(folder: str) -> None:
    """A package, in fp32."""
    whole = model()
    plain(whole)
    step, cache, position, states = prepared(whole)
    ids = torch.tensor([[5], [6]])
    program = torch.export.export(step, (ids, position, *(x.clone() for x in states)))
    path = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/step.pt2")
    follows(torch._inductor.aoti_load_package(path), whole, cache, position, states, 1e-5)


def page(blocks: str) -> None:
    """The first so many blocks of the page."""
    code = re.findall(r"^```python no-run\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(code) == 6  # the last needs onnx: tests/tools/test_onnx.py
    exec("\n".join(code[: int(blocks)]), {"__name__": "__page__"})


def run(*case, cwd=ROOT):
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, *case]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "case",
    [
        ("exported", "plain"),
        pytest.param(("exported", "auto"), marks=SLOW),
    ],
    ids="-".join,
)
def test_exported(case):
    run(*case)


@SLOW
def test_compiled_by_aotinductor(tmp_path):
    run("compiled", str(tmp_path))


@SLOW
def test_the_page(tmp_path):
    run("page", "5", cwd=tmp_path)


def test_a_step_by_tensors_is_a_step():
    """Eager; `plain` changes rounding alone."""
    for change in (lambda _: None, plain):
        whole = model()
        change(whole)
        step, cache, position, states = prepared(whole)
        follows(step, whole, cache, position, states, 1e-5)


@torch.no_grad()
def test_states_that_are_returned():
    whole = model()
    step, _, position, states = prepared(whole)
    before = [x.clone() for x in states]
    logits, *after = ExportableStep(whole, in_place=False)(torch.tensor([[5], [6]]), position, *states)
    assert all(torch.equal(a, b) for a, b in zip(states, before, strict=True))
    assert torch.equal(step(torch.tensor([[5], [6]]), position, *states), logits)
    assert all(torch.equal(a, b) for a, b in zip(states, after, strict=True))


def test_a_dense_model():
    whole = model(num_experts=0, intermediate_size=48)
    plain(whole)
    step, cache, position, states = prepared(whole)
    follows(step, whole, cache, position, states, 1e-5)


def test_refusals():
    whole = model()
    step, cache, *_ = prepared(whole)
    with pytest.raises(ValueError, match="holds 20 tokens, but there are 8 places"):
        step.states(cache, 8)
    with pytest.raises(ValueError, match="in int8"):
        step.states(whole.new_cache(kv_dtype="int8"), 8)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
