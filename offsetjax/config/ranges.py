"""What a value may be: a test that a machine makes, and the words for it, which complete "must be …"."""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from offsetjax.files import misplaced
from offsetjax.registry import Registry


@dataclass(frozen=True)
class Range:
    """The values that a field may take, among those of its type.

    Attributes:
        holds: whether a value of the field's type lies in the range.
        words: what it must be.
        choices: its values, where they are few.
        remedy: for a value that is not in it, what to write; "" where the words say it.
    """

    holds: Callable[[Any], bool]
    words: str
    choices: tuple[str, ...] = ()
    remedy: Callable[[Any], str] = lambda value: ""


@dataclass(frozen=True)
class Registered:
    """The names that a registry knows when it is asked, as others may have added to them; otherwise as `Range`."""

    registry: Registry[Any]
    empty: str = ""

    def holds(self, value: str) -> bool:
        """Whether a name is known, or stands for what is found out."""
        return value in self.choices

    @property
    def words(self) -> str:
        """What it must be."""
        return _one_of(self.choices) + (f" ('' {self.empty})" if self.empty else "")

    def remedy(self, value: str) -> str:
        """The nearest name."""
        return _did_you_mean(value, self.choices)

    @property
    def choices(self) -> tuple[str, ...]:
        """The names."""
        return (("",) if self.empty else ()) + self.registry.names


@dataclass(frozen=True)
class EachRegistered:
    """A tuple of names that a registry knows when it is asked; otherwise as `Range`."""

    registry: Registry[Any]

    def holds(self, values: tuple[str, ...]) -> bool:
        """Whether all names are known."""
        return all(value in self.choices for value in values)

    @property
    def words(self) -> str:
        """What it must be."""
        return "made of " + ", ".join(self.choices)

    def remedy(self, values: tuple[str, ...]) -> str:
        """The name nearest to the first that is not known."""
        return next((_did_you_mean(value, self.choices) for value in values if value not in self.choices), "")

    @property
    def choices(self) -> tuple[str, ...]:
        """The names."""
        return self.registry.names


# What a parameter can hold: beyond it a number that Python takes for finite is infinite where it is used.
_FLOAT32_MAX = 3.4028235e38
_INT32_MAX = 2**31 - 1


def count(least: int, most: int = _INT32_MAX) -> Range:
    """A whole number of `least` and more."""
    words = f"at least {least}" + (" and below 2**31" if most == _INT32_MAX else f" and at most {most}")
    return Range(lambda value: least <= value <= most, words)


def at_least(bound: float, at_most: float = _FLOAT32_MAX) -> Range:
    """A number of `bound` and more that float32 can hold."""
    words = "finite in float32" if at_most == _FLOAT32_MAX else f"at most {at_most}"
    return Range(lambda value: bound <= value <= at_most, f"at least {bound}, and {words}")


def above(bound: float, at_most: float = _FLOAT32_MAX) -> Range:
    """A number greater than `bound`."""
    words = f"above {bound} and " + ("finite in float32" if at_most == _FLOAT32_MAX else f"at most {at_most}")
    return Range(lambda value: bound < value <= at_most, words)


def between(least: float, most: float) -> Range:
    """A number between two others, exclusive."""
    return Range(lambda value: least < value < most, f"between {least} and {most}, exclusive")


def from_up_to(least: float, below: float) -> Range:
    """A number of `least` and more, but less than `below`."""
    return Range(lambda value: least <= value < below, f"at least {least} and below {below}")


def one_of(*names: str) -> Range:
    """One of some words."""
    return Range(lambda value: value in names, _one_of(names), names, lambda value: _did_you_mean(value, names))


def each_of(*names: str) -> Range:
    """A tuple of such words, in any order and number."""

    def remedy(values: tuple[str, ...]) -> str:
        wrong = next(value for value in values if value not in names)
        return _did_you_mean(wrong, names)

    return Range(lambda values: set(values) <= set(names), "made of " + ", ".join(names), names, remedy)


def _did_you_mean(word: str, names: Sequence[str]) -> str:
    folded = {name.lower(): name for name in names}
    near = difflib.get_close_matches(word[:100].lower(), folded, 1, 0.6)
    return f"did you mean {folded[near[0]]!r}?" if near and folded[near[0]] else ""


def each_at_least(bound: float) -> Range:
    """A tuple of numbers, each of `bound` and more."""
    words = f"numbers, each at least {bound:g} and finite in float32"
    return Range(lambda values: all(bound <= value <= _FLOAT32_MAX for value in values), words)


def each_count(least: int, most: int, length: int = 1) -> Range:
    """A tuple of whole numbers, of a length at least."""
    words = f"{length} or more whole numbers, each at least {least} and at most {most}"
    return Range(lambda values: len(values) >= length and all(least <= value <= most for value in values), words)


def at_most_letters(most: int, each: int) -> Range:
    """A tuple of so many texts at most, each of so many letters at most."""
    words = f"at most {most} texts of at most {each} letters"
    return Range(lambda values: len(values) <= most and all(len(value) <= each for value in values), words)


def _one_of(names: Iterable[str]) -> str:
    return "one of " + ", ".join(name or "''" for name in names)


ANY = Range(lambda value: True, "anything")
PLACE = Range(
    lambda value: not value or not misplaced(value), "a local path, or gs://BUCKET/…; or empty", (), misplaced
)
SIZE = Range(
    lambda value: not value or bool(re.fullmatch(r"[1-9]\d{0,4}[xX][1-9]\d{0,4}", value)),
    "width and height, such as 1152x896, or empty",
)
FINITE = Range(lambda value: abs(value) <= _FLOAT32_MAX, "a number that is finite in float32")
FINITE_NUMBERS = Range(
    lambda values: all(abs(value) <= _FLOAT32_MAX for value in values), "numbers, each finite in float32"
)
# float32 rounds what is nearer to 1 to 1: an average that never moves, and 0 / 0 in Adam.
DECAY = Range(lambda value: 0 <= value <= 1 - 2**-24, "at least 0 and below 1, in float32 too")
FACTOR = Range(lambda value: value == 0 or 1 < value <= _FLOAT32_MAX, "0, or above 1 and finite in float32")
FRACTION = Range(lambda value: 0 <= value <= 1, "between 0 and 1")
WEIGHTS = Range(
    lambda value: all(0 <= each <= _FLOAT32_MAX for each in value) and (not value or any(value)),
    "numbers of at least 0, of which one is above",
)
DISTINCT_TIMESTEPS = Range(
    lambda values: all(value >= 0 for value in values) and len(set(values)) == len(values), "timesteps, each once"
)
STEPS_TO_TRACE = Range(
    lambda values: not values or (len(values) == 2 and 1 <= values[0] <= values[1]),
    "the first and the last step to trace, such as (20, 24), or ()",
)
DEVICES = Range(lambda value: value == -1 or value >= 1, "-1 or at least 1")
