"""Peak resident memory of loading quantised checkpoints, in a separate process."""

import subprocess
import sys

import pytest
from gguf_files import write_model
from quantised_folders import FORMATS, write_folder
from test_cli import ROOT

import qwen3next as q

PROGRAM = """
import sys
import torch
import qwen3next as q
from qwen3next.checkpoints.reader import open_checkpoint

torch.set_num_threads(1)
small, path = sys.argv[1:3]


def peak():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields["VmHWM"].split()[0]) * 1024


q.load(small)  # first use of the code, whose memory is not counted
opened = open_checkpoint(path)
largest = max(torch.Size(stored.shape).numel() for stored in opened.stored.values())
opened.files.close()
before = peak()
model = q.load(path, dtype="bfloat16")
print(peak() - before, sum(p.nbytes for p in model.parameters()), largest)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize(
    "name", ["int4", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gptq", "nvfp4", "gguf"))]
)
def test_peak_is_the_model_and_one_dequantised_matrix(tmp_path, name):
    """9 bytes a number: 4 in fp32, the rest for codes, indices and what the allocator keeps; a second copy is seen."""
    paths = []
    for size in (96, 3072):
        config = q.presets.tiny(model_type="qwen3_5_text", num_experts=0, vocab_size=97, mtp_num_hidden_layers=0)
        config = config.replace(num_hidden_layers=1, layer_types=("full_attention",), full_attention_interval=1)
        model = q.Qwen3Next(config.replace(hidden_size=size, intermediate_size=size))
        path = tmp_path / (f"{size}.gguf" if name == "gguf" else str(size))
        if name == "gguf":
            write_model(path, model, kind="BF16")
        else:
            model.save_pretrained(path)
            write_folder(path, FORMATS[name])
        paths.append(str(path))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *paths], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    rise, held, largest = map(int, done.stdout.split())
    allowed = held + 9 * largest
    assert rise <= allowed + 8 * 2**20, f"{rise / 2**20:.0f} MiB of {allowed / 2**20:.0f}"
    assert rise > 0.5 * held  # the measurement sees the model
