"""The one reader of JSON: whatever a text from outside holds is a value within bounds, or one line, at a linear cost.

Python's own reader takes numbers of any length, NaN, names that occur twice, and nests until the stack is full, in
itself or in whoever walks through what it gave. Here each of these is a ValueError that says what it is.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NoReturn

MAX_BYTES = 2**28
MAX_DEPTH = 64  # far more than any format that is read here has; whoever walks through a value may recurse


def parse_json(text: str | bytes, most_bytes: int = MAX_BYTES, takes_nan: bool = False) -> Any:
    """The value that a JSON text stands for.

    Args:
        text: bytes are UTF-8, with or without a byte-order mark.
        takes_nan: whether it may hold NaN, Infinity and -Infinity, which are no JSON but which Python writes.

    Raises:
        ValueError: too long, nested too deep, not UTF-8, a name twice in an object, a number that no double or no
            64 bits hold, or no JSON; says which.
    """
    if len(text) > most_bytes:
        raise ValueError(f"{len(text)} bytes, more than {most_bytes}")
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    try:
        value = json.loads(
            text,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=float if takes_nan else _no_constant,
            object_pairs_hook=_object,
        )
    except RecursionError:
        raise ValueError("nested too deep") from None
    _check_depth(value)
    return value


def parse_object(text: str | bytes, most_bytes: int = MAX_BYTES, takes_nan: bool = False) -> dict[str, Any]:
    """The object that a JSON text stands for.

    Raises:
        ValueError: as for `parse_json`, or it is something else than an object.
    """
    value = parse_json(text, most_bytes, takes_nan)
    if not isinstance(value, dict):
        raise ValueError(f"a {_KINDS[type(value)]}, not an object")
    return value


_KINDS = {list: "list", str: "text", int: "number", float: "number", bool: "truth value", type(None): "null"}


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [each for values in inner for each in values]
        if not level:
            return
    raise ValueError("nested too deep")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError(f"the name {_twice(pairs)!r} twice in an object")
    return values


def _twice(pairs: list[tuple[str, Any]]) -> str:
    seen: set[str] = set()
    return next(name[:80] for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]


def _integer(text: str) -> int:
    if len(text) > 20:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:20]}, which is out of range")
    return value


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text}, which is no JSON")


KEY = "digest"  # of a JSON object's own digest


def of_json(values: Mapping[str, Any]) -> str:
    """The digest of a JSON object, whatever the order and the spacing of its text."""
    text = json.dumps({key: value for key, value in values.items() if key != KEY}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def signed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its digest; values are as JSON gives them back, such as lists in the place of tuples."""
    values = parse_object(json.dumps(values), takes_nan=True)
    return {**values, KEY: of_json(values)}


def is_damaged(values: Mapping[str, Any]) -> bool:
    """Whether a JSON object is not the one that was written; one without a digest was written before there were any."""
    return KEY in values and values[KEY] != of_json(values)
