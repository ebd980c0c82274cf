"""A progress bar on the terminal."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def tracked(items: Iterable[T], progress: bool, label: str, total: int | None = None) -> Iterator[T]:
    """The items, with a bar on the terminal if `progress`."""
    if not progress:
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, description=label, total=total, console=Console(stderr=True))  # stdout is for results
