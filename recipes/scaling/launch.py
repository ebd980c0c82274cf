"""Start the processes of a run on this machine. If one fails, one message says which and how."""

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

GRACE = 30.0  # seconds in which the launcher ends a process whose partner is gone


class RunFailed(Exception):
    """A process of the run failed; the others were ended."""


def launch(module: str, args: Sequence[str], processes: int) -> None:
    """Run `python -m module args` in so many processes, as torchrun does.

    Raises: RunFailed with the first process that failed, and how; or with the signal that stopped the run.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # `RunFailed` says what it would
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=f"titan-{os.getpid()}-{time.time_ns()}",
        max_restarts=0,
        monitor_interval=0.2,
        logs_specs=DefaultLogsSpecs(),
    )
    try:
        elastic_launch(config, sys.executable)("-m", module, *args)
    except SignalException as stopped:
        raise RunFailed(f"The run was stopped by {signal.Signals(stopped.sigval).name}.") from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            how = f"was killed by {signal.Signals(-failure.exitcode).name}"
        else:
            how = f"ended with status {failure.exitcode}"
        raise RunFailed(f"Process {rank} of {processes} {how}, so the run stopped.") from None


@contextlib.contextmanager
def lost_connection() -> Iterator[None]:
    """Where a message fails because another process is gone, wait to be ended: the launcher tells what happened."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if not any(word in str(error) for word in ("onnection", "peer", "NCCL", "timed out", "Timed out")):
            raise
        time.sleep(GRACE)
        print(f"A message to another process failed: {error}", file=sys.stderr)
        raise SystemExit(1) from None
