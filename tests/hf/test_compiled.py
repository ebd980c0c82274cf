"""torch.compile on the classes of qwen3next/hf.py: a forward, a training step, and `generate` over a compiled forward.

This file is also the program of a process of its own, because torch cannot trace the shape checks that conftest.py puts
around every function.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qwen3next as q

ROOT = Path(__file__).parents[2]


def work():
    import qwen3next.hf as hf

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "full_attention_interval": 2, "mtp_num_hidden_layers": 0, "initializer_range": 0.1}
    q.Qwen3Next(q.presets.tiny(**sizes)).save_pretrained("checkpoint")
    model = hf.Qwen3NextForCausalLM.from_pretrained("checkpoint")
    ids = torch.arange(40).view(2, 20) * 7 % 251
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        assert (compiled(ids, use_cache=False).logits - expected).abs().max() <= 1e-5
    found = []
    for run in (model, compiled):
        model.zero_grad()
        run(ids, labels=ids, use_cache=False).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 1e-4 * a.abs().max() + 1e-7
    options = {"max_new_tokens": 6, "do_sample": False}
    tokens = model.generate(ids, **options)
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(model.generate(ids, **options), tokens)
    assert torch.equal(model.generate(ids, **options, cache_implementation="static"), tokens)


@pytest.mark.slow
def test_compiled_models_give_the_same(tmp_path):
    pytest.importorskip("transformers", minversion="5.23")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    work()
