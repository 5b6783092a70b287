"""A progress bar on terminals, and who else wants to know that there is progress."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from offsetjax import log

Item = TypeVar("Item")
_listeners: list[Callable[[], None]] = []


def tracked(items: Iterable[Item], description: str, total: int, is_shown: bool = True) -> Iterator[Item]:
    """The items, with a bar on standard error that counts them and goes at the end; each is progress."""
    console = Console(file=log.stream)  # a bar whose terminal was closed must not end the work
    hidden = not (is_shown and console.is_terminal)
    for item in track(items, description, total, console=console, disable=hidden, transient=True):
        for heard in _listeners:
            heard()
        yield item


@contextlib.contextmanager
def heard_by(listener: Callable[[], None]) -> Iterator[None]:
    """Inside, a listener is called at each item of whatever is tracked."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
