"""Sections for the tests of the GPU check's processes: some end well, one crashes, one hangs, one is slow."""

import os
import signal
import time
from pathlib import Path

from recipes.gpu.bench import Job, Section


def row(name, **more):
    return lambda: iter([{"what": name, "pid": os.getpid()} | more])


def _raises():
    yield {"what": "before the error"}
    raise RuntimeError("CUDA error: an illegal memory access\nand more")


def _abort():
    yield {"what": "before the crash"}
    print("the last words", flush=True)
    os.abort()


def _hang():
    yield {"what": "before the hang"}
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})  # as code that never comes back to Python
    time.sleep(60)


def _sleeps():
    yield {"what": "before the sleep"}
    time.sleep(60)


def _slow(name):
    """Waits for a file next to the results that a test makes, or is stopped."""

    def run():
        yield {"what": f"{name} begins", "pid": os.getpid()}
        flag = Path(os.environ["GPU_SECTIONS_GO"])
        while not flag.exists():
            time.sleep(0.02)
        yield {"what": f"{name} ends", "infinite": float("inf"), "parts": [{"name": "x", "ms": 1.5}]}

    return run


SECTIONS = {
    "crashes": Section(lambda _: iter([Job("one", row("one")), Job("crash", _abort), Job("three", row("three"))]), 1.0),
    "raises": Section(lambda _: iter([Job("error", _raises), Job("after", row("after"))]), 1.0),
    "hangs": Section(lambda _: iter([Job("hang", _hang), Job("then", row("then"))]), 1.0),
    "sleeps": Section(lambda _: iter([Job("sleep", _sleeps), Job("awake", row("awake"))]), 1.0),
    "slow": Section(lambda _: iter([Job("quick", row("quick")), Job("slow", _slow("slow"))]), 1.0),
    "breaks": Section(lambda _: iter(["no job"]), 1.0),
    "last": Section(lambda _: iter([Job("last", row("last"))]), 1.0),
}
