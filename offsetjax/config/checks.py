"""What a config may hold: every field of its type and in its range; `rules.py` has what they may be together."""

from typing import Any

from ml_collections import ConfigDict

from offsetjax.config.field import Field
from offsetjax.config.rules import combinations
from offsetjax.config.schema import fields
from offsetjax.config.settings import flatten
from offsetjax.errors import UserError


def validate(config: ConfigDict) -> None:
    """Checks that a config has every field and no other, each value's type and range, and the combinations.

    Raises:
        UserError: with the field, its value and what it must be.
    """
    values, declared = dict(flatten(config)), fields()
    if values.keys() != declared.keys():
        wrong = sorted(values.keys() ^ declared.keys())[0]
        what = "lacks" if wrong in declared else "has"
        raise UserError(f"config: it {what} {wrong}; it must be the ConfigDict of default_config(), with its fields")
    for path, field in declared.items():
        check(path, field, values[path])
    for is_wrong, reason in combinations(values):
        if is_wrong:
            raise UserError(f"config: {reason}")


def check(path: str, field: Field, value: Any) -> None:
    """Raises a UserError unless a value is of its field's type and in its range."""
    if not field.has_type(value):
        raise UserError(f"config: {path} = {shown(value)} {must_be(field)}")
    if not field.holds(value):
        remedy = field.range.remedy(value)
        raise UserError(f"config: {path} = {shown(value)} must be {field.range.words}" + (remedy and f"; {remedy}"))


def must_be(field: Field) -> str:
    """What type a value has to be of, with one such."""
    return f"must be of type {field.type_name}, {example(field)}"


def example(field: Field) -> str:
    """What a value of the field looks like."""
    return f"such as {field.example!r}"


def shown(value: Any) -> str:
    """A value as Python writes it, in one line and of bounded length, whatever it is."""
    try:
        text = ascii(value) if isinstance(value, bytes) else repr(value)
    except Exception:  # a number of too many digits, or an object of the user's own
        text = f"a {type(value).__name__} that cannot be shown"
    text = " ".join(text.split())
    return text if len(text) <= 1000 else f"{text[:200]}… ({len(text)} letters)"
