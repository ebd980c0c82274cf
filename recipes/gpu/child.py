"""The process of one section: runs its jobs and passes rows to the parent as lines of JSON.

    python -m recipes.gpu.child          started by recipes.gpu.parent, with a line of JSON on its standard input

Lines that it writes to its standard output: {"begin": job, "seconds": limit}, {"job": job, "row": row},
{"end": job, "complete": false where its time was over}, {"finished": true}. Where the device is lost (after an illegal
memory access nothing runs in the process any more), it leaves with LOST, and the parent starts another for the rest.
"""

import gc
import importlib
import json
import math
import os
import sys
import threading
import time
import traceback
from typing import Any, TextIO

LOST = 3  # exit status
LARGEST_SHARE = 0.6  # of the time left to the section, for one job


def main() -> int:
    order = json.loads(sys.stdin.readline())
    # The parent's pipe is this process's standard output; whatever libraries print there goes to the log.
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    threading.Thread(target=_leave_with_the_parent, daemon=True).start()
    return run(order, lines)


def _leave_with_the_parent() -> None:
    """End as soon as the parent is gone: it holds the other end of standard input open."""
    sys.stdin.read()
    os._exit(1)


def run(order: dict[str, Any], lines: TextIO) -> int:
    """Run the jobs of a section that are not in order["skip"]; the exit status."""
    from recipes.gpu.bench import Bench, Settings

    if order["settings"]["device"] == "cpu":
        sys.modules["fla"] = None  # type: ignore[assignment]  # transformers would run its kernels on the CPU's tensors
    bench = Bench(Settings(**order["settings"]), time.monotonic() + order["seconds"])

    def send(**line: Any) -> None:
        print(json.dumps(line), file=lines, flush=True)

    section = importlib.import_module(order["module"]).SECTIONS[order["section"]]
    for job in section.jobs(bench):
        if job.name in order["skip"]:
            continue
        if bench.left < 1:
            send(job="", row={"what": f"{job.name} and what follows it", "not run": "the section's time was over"})
            break
        limit = LARGEST_SHARE * bench.left
        send(begin=job.name, seconds=limit)
        complete = _run_job(job, limit, send)
        send(end=job.name, complete=complete)
        if _lost(bench.device):
            return LOST
    send(finished=True)
    return 0


def _run_job(job: Any, limit: float, send: Any) -> bool:
    """Whether the job came to its end, be it by an error."""
    from recipes.gpu.time_limit import OutOfTime, at_most

    try:
        with at_most(limit):
            for row in job.run():
                send(job=job.name, row=_plain(row))
    except OutOfTime as over:
        send(job=job.name, row={"what": job.name, "stopped": str(over)})
        return False
    except Exception as error:  # reported as a row, so that the other jobs still run
        traceback.print_exc()
        first = (str(error).splitlines() or [""])[0]
        send(job=job.name, row={"what": job.name, "failed": f"{type(error).__name__}: {first}"[:400]})
    return True


def _lost(device: Any) -> bool:
    """Whether nothing runs on the device any more; gives memory back."""
    import torch

    gc.collect()
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def _plain(value: Any) -> Any:
    """For JSON, which has no infinity and no NaN."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # not through the interpreter's end: with a lost device that may hang
