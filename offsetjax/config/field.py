"""A field of a config, declared once: all that is known of it stands in one place, and everything else reads it there.

The checks of types and ranges, the defaults, the translation of other trainers' names, what may change when a run
resumes, what sets runs apart in a report, the choices of the command line and the reference page are made from it.
"""

import dataclasses
import enum
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from offsetjax.config.ranges import EachRegistered, Range, Registered

Texts = tuple[str, ...]
Numbers = tuple[float, ...]
Integers = tuple[int, ...]

_EXAMPLES = {str: "one text", int: 1, float: 0.1}


class Change(enum.Enum):
    """When a field may change."""

    NEVER = "never: it decides what a run learns"
    RESUME = "when a run resumes"
    FREELY = "when a run resumes; no loss depends on it, but for rounding, and reports pool runs that differ in it"


@dataclass(frozen=True)
class Field:
    """One field of a section.

    Attributes:
        name: within the section.
        type: bool, int, float, str, or a tuple of one of them.
        default: of that type.
        range: what the value may be, among those of its type.
        meaning: what it sets, in a sentence.
        unit: of the value, where it is not said by the name.
        elsewhere: what other trainers call it, and which.
        change: None: as the section says.
    """

    name: str
    type: Any
    default: Any
    range: Range | Registered | EachRegistered
    meaning: str
    unit: str = ""
    elsewhere: Mapping[str, str] = dataclasses.field(default_factory=dict)
    change: Change | None = None

    def holds(self, value: Any) -> bool:
        """Whether a value of this type is in the range."""
        try:
            return self.range.holds(value)
        except OverflowError:  # an integer beyond all floats
            return False

    @property
    def example(self) -> Any:
        """A value of this type: the default, or one that is not empty."""
        return self.default if self.default or not get_origin(self.type) else (_EXAMPLES[get_args(self.type)[0]],)

    @property
    def type_name(self) -> str:
        """The type in a word, or two."""
        return f"tuple of {get_args(self.type)[0].__name__}" if get_origin(self.type) else self.type.__name__

    def has_type(self, value: Any) -> bool:
        """Whether a value has the type of this field: no None, no bool for a number, no text that cannot be written."""
        if get_origin(self.type) is tuple:
            return type(value) is tuple and all(_is(get_args(self.type)[0], each) for each in value)
        return _is(self.type, value)


def _is(kind: type, value: Any) -> bool:
    if kind is bool:
        return isinstance(value, bool)
    if kind is str:
        return isinstance(value, str) and "\0" not in value and _is_unicode(value)
    return isinstance(value, int | float if kind is float else int) and not isinstance(value, bool)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a surrogate without its other half, as a broken escape leaves it
        return False
    return True


@dataclass(frozen=True)
class Section:
    """The fields that one part of the program reads.

    Attributes:
        path: `noise`, or `model.unet` for a section of a section; "" for the fields of the config itself.
        meaning: what it is of.
        fields: in the order in which a reader wants them.
        change: of the fields that do not say it themselves.
    """

    path: str
    meaning: str
    fields: tuple[Field, ...]
    change: Change = Change.NEVER

    @functools.cached_property
    def by_path(self) -> dict[str, Field]:
        """`{"noise.offset_strength": field}`, each field with what the section says of all."""
        prefix = f"{self.path}." if self.path else ""
        return {
            prefix + each.name: dataclasses.replace(each, change=each.change or self.change) for each in self.fields
        }
