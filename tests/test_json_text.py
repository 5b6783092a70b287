"""One reader of JSON: a value within bounds, or one line, in under a second."""

import ast
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offsetjax.json_text import MAX_DEPTH, parse_json, parse_object

PACKAGE = Path(__file__).parents[1] / "offsetjax"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 200_000, "nested too deep"),
        ("[" * 200_000 + "]" * 200_000, "nested too deep"),
        ('{"a":' * 900 + "1" + "}" * 900, "nested too deep"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested too deep"),
        ("1" * 5000, "an integer of 5000 digits"),
        ("-" * 3000 + "1", "Expecting value"),
        ("1e400", "out of range"),
        ("NaN", "no JSON"),
        ("[-Infinity]", "no JSON"),
        ('{"a": 1, "b": 2, "a": 3}', "the name 'a' twice"),
        (b"\xff\xfe", "utf-8"),
        (b'"' + b"\\" * 100_000, "Invalid|Unterminated"),
        ("", "Expecting value"),
    ],
)
def test_what_is_no_value_within_bounds_is_one_line(text: str | bytes, why: str) -> None:
    begin = time.monotonic()
    with pytest.raises(ValueError, match=why) as caught:
        parse_json(text)
    assert time.monotonic() - begin < 1
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("text", ["5", "null", "[]", '"{}"', "true"])
def test_another_kind_of_value_is_no_object(text: str) -> None:
    with pytest.raises(ValueError, match="not an object"):
        parse_object(text)


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(VALUES)
def test_any_value_that_python_writes_is_read_as_it_is(value: Any) -> None:
    assert parse_json(json.dumps(value), takes_nan=True) == value


def test_no_other_module_reads_json() -> None:
    readers = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            is_attribute = isinstance(node, ast.Attribute) and node.attr in ("load", "loads", "JSONDecoder")
            if is_attribute and isinstance(node.value, ast.Name) and node.value.id in ("json", "orjson", "ujson"):
                readers.add(file.name)
            if isinstance(node, ast.ImportFrom) and node.module in ("json", "json.decoder", "orjson", "ujson"):
                readers.add(file.name)
    assert readers == {"json_text.py"}
