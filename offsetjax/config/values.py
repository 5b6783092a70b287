"""One value of a field: of its type, in its range, and as text."""

import ast
from typing import Any, get_args, get_origin

from offsetjax.config.field import Field
from offsetjax.errors import UserError


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


def from_text(path: str, field: Field, text: str) -> Any:
    """The value of a field from text, as a command line has it.

    Raises:
        UserError: the text is not of the field's type.
    """
    try:
        return _parse(text, field)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise UserError(f"config: {path} = {shown(text)} is not of type {_kind(field)}, {_how(field)}") from None


def _parse(text: str, field: Field) -> Any:
    if field.type is bool:
        return {"true": True, "false": False}[text.lower()] if text.lower() in ("true", "false") else _fail(text)
    if field.type in (int, float):
        return field.type(text)
    if get_origin(field.type) is tuple:
        return _parse_tuple(text, get_args(field.type)[0])
    return text


def _parse_tuple(text: str, item: type) -> tuple[Any, ...]:
    """A tuple as Python writes it; one item may stand alone, and a text without quotes."""
    if item is str and text.strip()[:1] not in ("(", "[", "{", "'", '"', ""):
        return (text,) if text not in ("None", "True", "False") else _fail(text)
    value = ast.literal_eval(text)
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    is_right = all(isinstance(each, str if item is str else int | float) for each in values)
    return values if is_right else _fail(text)


def _fail(text: str) -> Any:
    raise ValueError(text)


def _kind(field: Field) -> str:
    return "tuple" if get_origin(field.type) is tuple else field.type.__name__


def _how(field: Field) -> str:
    """How a value is written on a command line."""
    if get_origin(field.type) is tuple and get_args(field.type)[0] is str:
        return """such as 'one text' or '("one text", "another")', brackets and quotes closed"""
    return example(field)
