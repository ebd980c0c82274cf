"""Runs in a new environment (matrix.py): use the installed package, and print one line of JSON about it."""

import json
import platform
import subprocess
import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")  # without a compiler, a warning says that torch's operations run

import torch  # noqa: E402

import qwen3next as q  # noqa: E402
from layers.cpp import build  # noqa: E402

assert "site-packages" in q.__file__, q.__file__
torch.manual_seed(0)
model = q.Qwen3Next(q.presets.tiny())
ids = torch.randint(0, 256, (2, 40))
model.loss(ids).total.backward()
assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
model.save_pretrained("checkpoint")
again = q.load("checkpoint")
text = q.generate(again, ids, max_new_tokens=12)
assert torch.equal(text, q.generate(model, ids, max_new_tokens=12, draft_tokens=2))
with torch.no_grad():
    cache = again.new_cache(2)
    steps = torch.stack([again.step(token, cache) for token in ids[:, :8].split(1, dim=1)], dim=1)
    assert (steps - again(ids[:, :8]).logits).abs().max() < 1e-4
command = Path(sys.executable).with_name("qwen3next")
for arguments in (
    ["--version"],
    ["inspect", "tiny", "--json"],
    ["explain", "checkpoint", "--json"],
    ["completion", "bash"],
):
    subprocess.run([command, *arguments], check=True, capture_output=True)
doctor = subprocess.run([command, "doctor", "--json"], check=False, capture_output=True, text=True)
findings = json.loads(doctor.stdout)["findings"]
broken = [one for one in findings if one["state"] == "broken"]
assert doctor.returncode == bool(broken)
assert not broken, broken
report = {
    "python": platform.python_version(),
    "torch": torch.__version__,
    "compiled": build.missing() is None,
    "decode": {row.operation: row.runs for row in q.explain(again)}["decode"],
}
print(json.dumps(report))
