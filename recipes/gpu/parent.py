"""Run each section in a process of its own, with a time limit, and collect its rows as they come."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from recipes.gpu.bench import Row, Section, Settings

ROOT = Path(__file__).parents[2]
GRACE = 10.0  # seconds between a job's own time limit and the end of its process
MOST_STARTS = 20  # processes for one section


@dataclass
class Progress:
    """Jobs of one section by name: `done` need not run again, `tried` not in this run."""

    done: list[str] = field(default_factory=list)
    tried: set[str] = field(default_factory=set)


@dataclass
class Runner:
    """Starts the processes of sections.

    Attributes:
        note: called with the section, the job ("" for none) and the row.
        finished: called with section and job as a job need not run again.
        log: file to which what the processes print is appended.
        module: where the processes find SECTIONS.
    """

    note: Callable[[str, str, Row], None]
    finished: Callable[[str, str], None]
    log: Path
    module: str

    def run(self, name: str, settings: Settings, seconds: float, done: list[str]) -> None:
        """Run one section. A process that dies is followed by another for the jobs that are left."""
        ends, progress = time.monotonic() + seconds, Progress(list(done), set())
        for _ in range(MOST_STARTS):
            before = len(progress.tried)
            if self._one_process(name, settings, ends, progress):
                return
            if len(progress.tried) == before:  # it did not come to a job, and would not again
                return
            if ends - time.monotonic() < 2:
                self.note(name, "", {"what": "what follows", "not run": "the section's time was over"})
                return
        self.note(name, "", {"what": "the section", "stopped": f"{MOST_STARTS} processes died"})

    def _one_process(self, name: str, settings: Settings, ends: float, progress: Progress) -> bool:
        """Whether the section came to its end."""
        seconds, place = ends - time.monotonic(), self.log.stat().st_size if self.log.exists() else 0
        order = {"section": name, "module": self.module, "settings": asdict(settings), "seconds": seconds}
        order["skip"] = sorted({*progress.done, *progress.tried})
        with self.log.open("ab") as log:
            process = start(log)
        watch = _Watch(self, name, progress, process, limit=ends + GRACE)
        try:
            end = watch.until_it_ends(order)
        finally:
            kill(process)
        if end == "finished":
            return True
        reason = f"killed: {end}" if end else f"{_status(process)}; {self._last_line(place)}"
        job = watch.job
        self.note(name, job, {"what": job or "the section's process", "stopped" if end else "failed": reason})
        if job:
            progress.tried.add(job)
            if not end:  # it crashed, and would again
                self.finished(name, job)
        return False

    def _last_line(self, place: int) -> str:
        """The last line that was logged behind this place."""
        with self.log.open("rb") as log:
            log.seek(place)
            lines = log.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1].strip()[:300] if lines else "it said nothing"


class _Watch:
    """Reads what a process writes. `job` is the one that runs; with a time limit of its own."""

    def __init__(
        self, runner: Runner, section: str, progress: Progress, process: subprocess.Popen[str], *, limit: float
    ):
        self.runner, self.section, self.progress, self.process = runner, section, progress, process
        self.section_limit = self.limit = limit
        self.job = ""
        self.lines: queue.Queue[str | None] = queue.Queue()

    def until_it_ends(self, order: Mapping[str, Any]) -> str:
        """ "finished", or the reason why it has to be killed, or "" where it died."""
        assert self.process.stdin is not None
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return ""
        while True:
            try:
                line = self.lines.get(timeout=max(self.limit - time.monotonic(), 0.01))
            except queue.Empty:
                return "it did not answer in its time"
            if line is None:
                self.process.wait()
                return ""
            if self._take(line):
                return "finished"

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def _take(self, line: str) -> bool:
        """Act on a line; True for the last."""
        try:
            said = json.loads(line)
        except ValueError:  # a library wrote to standard output
            return False
        if not isinstance(said, dict):
            return False
        if "begin" in said:
            self.job, self.limit = said["begin"], time.monotonic() + said["seconds"] + GRACE
        elif "row" in said:
            self.runner.note(self.section, said["job"], said["row"])
        elif "end" in said:
            self.progress.tried.add(said["end"])
            self.job, self.limit = "", self.section_limit
            if said["complete"]:
                self.runner.finished(self.section, said["end"])
        return bool(said.get("finished"))


def start(log: IO[bytes]) -> subprocess.Popen[str]:
    """The process of a section, in a group of its own, so that whatever it started ends with it."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    return subprocess.Popen(
        [sys.executable, "-m", "recipes.gpu.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )


def kill(process: subprocess.Popen[str]) -> None:
    """End the process and its group, and wait for it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _status(process: subprocess.Popen[str]) -> str:
    code = process.returncode
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return "the device was lost" if code == 3 else f"left with status {code}"


def shares(sections: Mapping[str, Section], left: float, name: str) -> float:
    """Seconds of a section: its part of what is left to it and to those behind it."""
    names = list(sections)
    later = names[names.index(name) :]
    return left * sections[name].weight / sum(sections[other].weight for other in later)
