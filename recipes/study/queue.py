"""Run many tasks within a time budget: a common number of steps, several processes, progress, stopping.

All runs of an experiment have the same number of steps, so that arms are compared at equal tokens. A budget sets this
number once, from a few timed steps of every arm.
"""

import json
import multiprocessing
import multiprocessing.process
import os
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from recipes.pretrain import Stopped, stop_on_signal
from recipes.study.progress import Board, StudyLive, Watched, say
from recipes.study.run import RESULT, Task, run, seconds_per_step, write_json

LOOKS_OF_A_RUN = 20
LEAST_SHARE = 0.02  # least share of the preset's steps; with fewer, results are meaningless
SLACK = 0.92  # share of the budget for steps; the rest is for startup, the final measurement and slowdowns


def parse_budget(text: str) -> float:
    """Parse "90s", "20m" or "1.5h" into seconds. Raises: ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", text.strip())
    if match is None or not float(match[1]):
        raise ValueError(f'budget is {text!r}: give seconds, minutes or hours, such as "90s", "20m" or "1.5h".')
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def with_steps(tasks: Sequence[Task], *, plan: Path, budget: str | None, jobs: int, console: Console) -> list[Task]:
    """The tasks with their number of steps: that in the file `plan` if it exists, else the preset's within the budget.

    Args:
        plan: file that keeps the number, so that later and resumed arms train equally long.
    Raises: ValueError for a budget that is too small.
    """
    wanted = tasks[0].settings.steps
    assert wanted is not None
    if plan.is_file():
        steps = json.loads(plan.read_bytes())["steps"]
        if budget is not None:
            say(console, f"{plan} sets {steps} steps for each run; the budget does not change this.")
    else:
        seconds = None if budget is None else parse_budget(budget)
        steps, times = wanted, dict[str, float]()
        if seconds is not None:
            steps, times = _within(tasks, wanted, seconds * jobs, jobs, console)
        plan.parent.mkdir(parents=True, exist_ok=True)
        write_json(plan, {"steps": steps, "wanted": wanted, "budget": budget, "jobs": jobs, "seconds_per_step": times})
    every = max(steps // LOOKS_OF_A_RUN, 1)
    return [
        replace(t, settings=replace(t.settings, steps=steps, eval_every=every, save_every=2 * every)) for t in tasks
    ]


def _within(
    tasks: Sequence[Task], wanted: int, seconds: float, jobs: int, console: Console
) -> tuple[int, dict[str, float]]:
    """The number of steps that all tasks can do in the given seconds, and the seconds of a step by arm."""
    one_each = {(task.kind, task.arm, task.settings.precision): task for task in tasks}
    say(console, f"Timing a step of each of {len(one_each)} arms ...")
    if jobs == 1:
        measured = [seconds_per_step(task) for task in one_each.values()]
    else:  # time with as many processes as will run, because they slow each other down
        with multiprocessing.get_context("spawn").Pool(jobs, _prepare, (threads_of(jobs),)) as pool:
            measured = pool.map(seconds_per_step, one_each.values(), chunksize=1)
    times = dict(zip(one_each, measured, strict=True))
    keys = [(task.kind, task.arm, task.settings.precision) for task in tasks]
    a_step = sum(times[key][0] for key in keys)
    looks = sum(times[key][1] for key in keys) * (LOOKS_OF_A_RUN + 2)
    steps = min(wanted, int((SLACK * seconds - looks) / a_step))
    if steps < max(LEAST_SHARE * wanted, 2 * tasks[0].settings.warmup):
        need = (max(LEAST_SHARE * wanted, 2 * tasks[0].settings.warmup) * a_step + looks) / SLACK / jobs
        raise ValueError(
            f"The budget gives {max(steps, 0)} steps to each of {len(tasks)} runs, too few for a result: "
            f"give {need / 60:.0f} minutes or more, or choose fewer --arms or --seeds."
        )
    return steps, {f"{arm} {precision}": round(times[kind, arm, precision][0], 6) for kind, arm, precision in times}


def _prepare(threads: int) -> None:
    """The process that times steps; ignores Ctrl-C, which its parent handles."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)


def threads_of(jobs: int) -> int:
    """CPU threads for each of the processes."""
    return max((os.cpu_count() or 1) // jobs, 1)


def run_all(tasks: Sequence[Task], *, jobs: int, console: Console) -> None:
    """Run the unfinished tasks in the given order, `jobs` at a time.

    Raises: Stopped after a signal, once every active run has saved its state; Failed if a process failed; the errors of
        `run`.
    """
    left = [task for task in tasks if not (task.settings.out / RESULT).is_file()]
    if len(left) < len(tasks):
        say(console, f"{len(tasks) - len(left)} of {len(tasks)} runs are finished already.")
    if jobs == 1 or len(left) == 1:
        for i, task in enumerate(left):
            say(console, f"Run {i + 1} of {len(left)}: {task.name}")
            with StudyLive(console) as live:
                run(task, live=live, console=console)
    elif left:
        _in_processes(left, jobs, console)


class Failed(OSError):
    """A worker process ended with an error; the message has the error."""


def _work(todo: Any, done: Any, threads: int) -> None:
    """The worker process: runs one task after another. Its parent receives Ctrl-C and forwards it."""
    os.setsid()
    torch.set_num_threads(threads)
    quiet = Console(file=open(os.devnull, "w"))  # noqa: SIM115
    while (item := todo.get()) is not None:
        number, task = item
        done.put((number, "begun", ""))
        try:
            run(task, live=Watched(quiet), console=quiet)
            done.put((number, "done", ""))
        except Stopped:
            done.put((number, "stopped", ""))
            return
        except Exception as error:  # every error must be reported to the parent process
            done.put((number, "failed", f"{type(error).__name__}: {error}"))
            return


def _in_processes(tasks: Sequence[Task], jobs: int, console: Console) -> None:
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    todo, done = context.Queue(), context.Queue()
    for item in [*enumerate(tasks), *[None] * jobs]:
        todo.put(item)
    workers = [context.Process(target=_work, args=(todo, done, threads_of(jobs))) for _ in range(jobs)]
    begun, active, finished, trouble = time.monotonic(), set[int](), 0, ""
    with stop_on_signal() as asked, Board(console, tasks) as board:
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers) or not done.empty():
            time.sleep(0.2)
            while not done.empty():
                number, what, why = done.get()
                active = active | {number} if what == "begun" else active - {number}
                finished += what == "done"
                trouble = trouble or (f"{tasks[number].name} failed: {why}" if what == "failed" else "")
            board.show(active, finished, time.monotonic() - begun)
            dead = [worker.exitcode for worker in workers if worker.exitcode]
            trouble = trouble or (f"A process died with status {dead[0]}, out of memory perhaps." if dead else "")
            if asked or trouble:
                _stop(workers)
                todo.cancel_join_thread()  # the remaining items are not needed
                break
        for worker in workers:
            worker.join()
    if trouble:
        raise Failed(f"{trouble} Finished runs are kept; run the same command again to continue.")
    if asked:
        name = signal.Signals(asked[0]).name
        raise Stopped(asked[0], f"{name}: every active run has saved its state. Run the command again to continue.")


def _stop(workers: Sequence[multiprocessing.process.BaseProcess]) -> None:
    for worker in workers:
        if worker.is_alive():
            worker.terminate()  # SIGTERM, upon which a run saves its state
