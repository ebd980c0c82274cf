"""Peak resident memory of loading and saving, in a process of its own."""

import subprocess
import sys

import pytest
from test_cli import ROOT

PROGRAM = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
import qwen3next as q
from qwen3next.opened import open_checkpoint

torch.set_num_threads(1)
folder, action, target = sys.argv[1:4]


def peak():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields["VmHWM"].split()[0]) * 1024


tiny = q.Qwen3Next(q.presets.tiny())  # what the machinery itself costs is not the model's
tiny.save_pretrained(target + "-tiny")
q.load(target + "-tiny")
opened = open_checkpoint(folder)
sizes = [stored.nbytes for stored in opened.stored.values()]
opened.files.close()
before = peak()
if action == "convert":
    from qwen3next.convert import convert
    convert(folder, target, experts="fused")
    allowed = 2 * max(q.presets.small().num_experts * 3 * 128 * 384 * 4, *sizes)
else:
    model = q.load(folder)
    allowed = sum(sizes) + max(sizes)
    if action == "save":
        q.save(model, target)
        allowed += max(sizes)
print(peak() - before, allowed)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("action", ["load", "save", "convert"])
def test_peak_is_the_model_and_one_tensor(tmp_path, action):
    import qwen3next as q

    config = q.presets.small(vocab_size=32_768)
    q.Qwen3Next(config).save_pretrained(tmp_path / "m")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "m"), action, str(tmp_path / "out")],
        capture_output=True, text=True, timeout=300, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rise, allowed = map(int, done.stdout.split())
    assert rise <= allowed + 8 * 2**20, f"{rise / 2**20:.0f} MiB of {allowed / 2**20:.0f}"
    if action != "convert":
        assert rise > 0.8 * allowed / 2  # it does measure
