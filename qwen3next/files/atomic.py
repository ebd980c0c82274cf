"""Atomic writes of files and folders."""

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of linux/fcntl.h and linux/fs.h


@contextmanager
def usable(path: str | Path) -> Iterator[None]:
    """Wrap the first use of a path. Raises: ValueError if no file or folder can have it."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and "null" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{str(path)[:200]!r} cannot be used here ({reason}): give another name.") from None


@contextmanager
def fresh_folder(folder: Path, *, replaced: Callable[[str], bool]) -> Iterator[Path]:
    """Yield a temporary folder that replaces `folder` if the block succeeds, and is deleted if it fails.

    Args:
        replaced: whether a file of the old folder, by name, is left out of the copy that the new folder starts with.
    Raises: ValueError if `folder` cannot be a folder to write into.
    """
    if folder.name in ("", ".."):
        raise ValueError(f"{str(folder)!r} does not name a folder: give the path of the folder to write.")
    with usable(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file: give a folder to write into.")
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name[:60]}-", dir=folder.parent))
    try:
        fresh.chmod(0o755)
        for kept in folder.iterdir() if folder.is_dir() else ():
            if not replaced(kept.name):
                (shutil.copytree if kept.is_dir() else shutil.copy2)(kept, fresh / kept.name)
        yield fresh
        _take_place(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@contextmanager
def fresh_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` if the block succeeds, and is deleted if it fails.

    Raises: ValueError if `path` cannot be a file to write.
    """
    with usable(path):
        if not path.name or path.is_dir():
            raise ValueError(f"{str(path)!r} is a folder: give a file to write.")
        path.parent.stat()
        with suppress(FileNotFoundError):
            path.lstat()
    fresh = path.with_name(f".{path.name[:60]}-{uuid4().hex[:12]}")  # unique: other threads may write the same file
    try:
        yield fresh
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def _take_place(fresh: Path, folder: Path) -> None:
    """Rename `fresh` to `folder`. `fresh`, if it still exists, is then the old folder."""
    if not folder.exists():
        fresh.rename(folder)
    elif not _exchange(fresh, folder):
        # Without an exchange, `folder` does not exist between these two renames.
        old = folder.with_name(f".{folder.name}-old-{uuid4().hex[:12]}")
        folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names atomically; False if the kernel or file system cannot (only Linux can)."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    done = renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0
    if not done and (error := ctypes.get_errno()) not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        raise OSError(error, os.strerror(error), str(b))
    return done
