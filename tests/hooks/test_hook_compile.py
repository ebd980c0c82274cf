"""Idle hook points do not change a compiled model: one graph, the same bits; hooks attached later fire.

Each test runs this file in a separate process, because torch.compile cannot trace the shape checks that conftest.py
puts around every function.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qwen3next as q

TOKENS = torch.arange(140).view(2, 70)  # two chunks
BETA = "blocks.1.linear_attn.hook_beta"
LATER = ["blocks.0.linear_attn.hook_state", "blocks.3.self_attn.hook_pattern"]


def one_graph(**changes):
    torch.manual_seed(0)
    model = q.Qwen3Next(q.presets.tiny(initializer_range=0.1, **changes)).bfloat16().eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    plain = model(TOKENS).logits
    assert torch.equal(compiled(TOKENS).logits, plain)
    for factor in (0.0, 0.5):
        with model.hooks([(BETA, lambda beta, _hook, factor=factor: beta * factor)]):
            hooked = compiled(TOKENS).logits
            assert torch.equal(hooked, model(TOKENS).logits)
        assert not torch.equal(hooked, plain)
    assert torch.equal(compiled(TOKENS).logits, plain)


def dense():
    one_graph(num_experts=0)


def experts():
    one_graph()


def exposed_later():
    model = q.Qwen3Next(q.presets.tiny(num_experts=0)).eval()
    compiled = torch.compile(model, backend="eager")
    compiled(TOKENS)
    seen = []
    with (
        model.materialize(state={0: [3]}, pattern=[3]),
        model.hooks([(LATER, lambda _x, hook: seen.append(hook.name))]),
    ):
        compiled(TOKENS)
    assert seen == LATER


@pytest.mark.parametrize("case", [pytest.param(dense, marks=pytest.mark.slow), experts, exposed_later])
def test_compiled(case):
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, case.__name__]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    with torch.no_grad():
        globals()[sys.argv[1]]()
