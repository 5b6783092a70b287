"""A progress bar on terminals."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from offsetjax import log

Item = TypeVar("Item")


def tracked(items: Iterable[Item], description: str, total: int, is_shown: bool = True) -> Iterator[Item]:
    """The items, with a bar on standard error that counts them and goes at the end."""
    console = Console(file=log.stream)  # a bar whose terminal was closed must not end the work
    hidden = not (is_shown and console.is_terminal)
    yield from track(items, description, total, console=console, disable=hidden, transient=True)
