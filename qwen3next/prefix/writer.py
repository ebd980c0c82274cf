"""A thread that does jobs on files in their order. Callers do not wait for it; it skips jobs if too much waits."""

import logging
import threading
from collections import deque
from collections.abc import Callable

LOG = logging.getLogger(__name__)


class Writer:
    """A thread that does jobs in the order in which they came. It starts with the first one and ends by `close`.

    Args:
        most: bytes that may wait; a job that exceeds them is left out, unless nothing waits.
    """

    def __init__(self, most: int):
        self.most = most
        self._jobs: deque[tuple[Callable[[], None], int]] = deque()  # the first one is being done
        self._waiting, self._closed = 0, False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def put(self, job: Callable[[], None], size: int = 0) -> bool:
        """Let a job be done that holds so many bytes. Returns: False if it is left out."""
        with self._changed:
            if self._closed or (self._jobs and size and self._waiting + size > self.most):
                return False
            self._jobs.append((job, size))
            self._waiting += size
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="qwen3next-prefix-writer", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return True

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all jobs are done, or for so many seconds. Returns: whether they are."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs, timeout)

    def close(self, timeout: float | None = None) -> None:
        """Do what waits, for so many seconds at most, and end the thread."""
        self.flush(timeout)
        with self._changed:
            self._closed = True
            while len(self._jobs) > 1:  # the first one is being done
                self._jobs.pop()
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return
                job, size = self._jobs[0]
            try:
                job()
            except OSError as error:  # the folder is full or gone: what is in memory serves on
                LOG.warning("a prefix was not written: %s", error.strerror)
            except Exception as error:  # the thread must live
                LOG.warning("a prefix was not written: %s", type(error).__name__)
            with self._changed:
                del job  # and the tensors that it holds
                self._jobs.popleft()
                self._waiting -= size
                self._changed.notify_all()
