"""A step of a dense model as an ONNX file that onnxruntime runs. This file is also the program of a process of its own,
because torch cannot trace the shape checks that conftest.py puts around every function.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qwen3next as q
from qwen3next.decoding.exportable import ExportableStep, plain

ROOT = Path(__file__).parents[2]


@torch.no_grad()
def work():
    import onnxruntime

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "full_attention_interval": 2, "initializer_range": 0.1}
    model = q.Qwen3Next(q.presets.tiny(num_experts=0, intermediate_size=96, **sizes)).eval()
    plain(model)
    cache = model.new_cache(batch=2, max_len=64)
    model(torch.arange(40).view(2, 20), cache=cache)
    step = ExportableStep(model, in_place=False)
    position, states = step.states(cache, 64)
    torch.onnx.export(step, (torch.tensor([[5], [9]]), position, *states), dynamo=True).save("step.onnx")
    session = onnxruntime.InferenceSession("step.onnx")
    names = [given.name for given in session.get_inputs()]
    for token in (5, 9, 77):
        ids = torch.tensor([[token], [token + 1]])
        given = [x.numpy() for x in (ids, position, *states)]
        logits, *states = map(torch.from_numpy, session.run(None, dict(zip(names, given, strict=True))))
        assert (logits - model.step(ids, cache)).abs().max() <= 1e-5
        position = position + 1
    for got, expected in zip(states, step.states(cache, 64)[1], strict=True):
        assert (got - expected).abs().max() <= 1e-5
    experts = q.Qwen3Next(q.presets.tiny(**sizes)).eval()
    plain(experts)
    step = ExportableStep(experts, in_place=False)
    position, states = step.states(experts.new_cache(batch=2), 64)
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="view"):  # else docs/export.md has to change
        torch.onnx.export(step, (ids, position, *states), dynamo=True)


def test_a_dense_step_in_onnxruntime(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    work()
