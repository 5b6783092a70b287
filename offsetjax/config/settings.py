"""The dictionary that holds a config, and remembers which of its fields were set.

A value that a user sets is a statement, even where it is the default: a checkpoint that says otherwise contradicts it.
What a checkpoint or a calibration fills in is none, and is assigned while the dictionary is unlocked.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict


class Settings(ConfigDict):
    """A `ConfigDict` that notes the fields assigned to since it was locked."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        object.__setattr__(self, "_explicit", set())
        super().__init__(*arguments, **options)

    def __setitem__(self, key: str, value: Any) -> None:
        old = self._fields.get(key)
        if self.is_type_safe and isinstance(value, bool) and type(old) in (int, float):  # Python takes True for 1
            raise TypeError(f"Could not override field {key!r}: it is a number, such as {old!r}, not {value}")
        super().__setitem__(key, value)
        if self.is_locked:
            self._explicit.add(key)

    def copy_and_resolve_references(self, visit_map: Any = None) -> "Settings":
        """A deep copy, with what was noted."""
        copy = super().copy_and_resolve_references(visit_map)
        copy._explicit.update(self._explicit)
        return copy

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._explicit.update(state["_explicit"])


def flatten(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields `("noise.offset_strength", value)` for each field, sections and fields by name."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def is_explicit(config: ConfigDict, path: str) -> bool:
    """Whether a field was set, by a config file, an override or a program; whatever the value."""
    section, name = _section(config, path)
    return name in getattr(section, "_explicit", ())


def explicit_paths(config: ConfigDict) -> tuple[str, ...]:
    """The fields that were set, by name."""
    return tuple(path for path, _ in flatten(config) if is_explicit(config, path))


def assign(config: ConfigDict, path: str, value: Any, explicit: bool = True) -> None:
    """Sets a field whatever its type was.

    Args:
        explicit: whether this is a statement of the user's; otherwise it is filled in, and stays what it was.
    """
    section, name = _section(config, path)
    with section.ignore_type(), contextlib.nullcontext() if explicit else section.unlocked():
        section[name] = value


def _section(config: ConfigDict, path: str) -> tuple[ConfigDict, str]:
    *sections, name = path.split(".")
    for section in sections:
        config = config[section]
    return config, name
