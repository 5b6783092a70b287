"""What a config names by a word (a family, a process, a source, a writer, an optimizer), and how others add theirs.

A program that brings its own calls `register`, as a config file may; a package that is installed declares an entry
point of the registry's group instead, and every command then knows it. No name is ever imported because a stored
config says so.

    FAMILIES = Registry("model.family", "offsetjax.families", {"sd1": "offsetjax.models.stable_diffusion:SD1"})
    FAMILIES["sd1"]
"""

import difflib
import importlib.metadata
import pkgutil
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from offsetjax.errors import UserError

T = TypeVar("T")


class Registry(Generic[T]):
    """Named things of one kind; those of our own are imported at their first use.

    Args:
        field: the config's field that names one of them, for the messages.
        group: of entry points.
        own: ours, each as `module:attribute`.
    """

    def __init__(self, field: str, group: str, own: Mapping[str, str]) -> None:
        self._field, self._group, self._own = field, group, dict(own)
        self._registered: dict[str, T] = {}
        self._points: dict[str, Any] | None = None

    def register(self, name: str, value: T) -> None:
        """Adds one for this program, or replaces one that was added before.

        Raises:
            ValueError: the name is one of ours.
        """
        if name in self._own:
            raise ValueError(f"{self._field}: {name!r} is a name of offsetjax itself; give another")
        self._registered[name] = value

    @property
    def names(self) -> tuple[str, ...]:
        """All that can be named: ours, those that were registered, those of installed packages."""
        return tuple(dict.fromkeys([*self._own, *self._registered, *self._installed()]))

    def is_own(self, name: str) -> bool:
        """Whether a name is one of ours."""
        return name in self._own

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> T:
        """The thing of that name.

        Raises:
            UserError: there is none; the nearest name is suggested.
        """
        if name in self._own:
            return pkgutil.resolve_name(self._own[name])
        if name in self._registered:
            return self._registered[name]
        installed = self._installed()
        if name in installed:
            return installed[name].load()
        near = difflib.get_close_matches(name, self.names, 1)
        raise UserError(
            f"config: {self._field} = {name!r} is not known; "
            + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(self.names)}")
        )

    def _installed(self) -> dict[str, Any]:
        if self._points is None:  # read once: it takes milliseconds, and what is installed stays
            self._points = {point.name: point for point in importlib.metadata.entry_points(group=self._group)}
        return self._points
