"""Good files, and what chance makes of them: bytes that change, JSON with other values, texts of no sense."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 2**31, 2**63, -(2**63), 10**19, 0.5, -0.0, 1e308, 5e-324, 1e-300, -1e9),
    *(
        "",
        "NaN",
        "Infinity",
        "None",
        "a",
        "..",
        "../x",
        "/etc/passwd",
        "\0",
        "\x1b]0;x\x07",
        "\ud83d",
        "\u2028",
        "a\nb",
    ),
    *(
        "9" * 5000,
        "a" * 20_000,
        "(" * 500,
        "(a+)+$",
        [],
        {},
        [[]],
        [None],
        {"": 0},
        [1] * 300,
        ["a"] * 300,
        [{}],
        [[1, 2]],
    ),
    *({"__class__": "x"}, {"content": 1}, {"content": "a"}, [["a", "b"]], ["a b", "c"], "CrossAttnDownBlock2D"),
]
TEXTS = [
    *(
        b"",
        b"5",
        b"null",
        b"[]",
        b"{}",
        b'"a"',
        b"\xff\xfe",
        b"\xef\xbb\xbf{}",
        b"[" * 5000,
        b'{"a":' * 900,
        b"-" * 3000,
    ),
    *(
        b"NaN",
        b'{"a": NaN}',
        b"1" * 5000,
        b"1e999",
        b'{"a": 1, "a": 2}',
        b"\0" * 900,
        b"{" * 1000,
        b"\n" * 900,
        b"PK\x03\x04",
    ),
]
BYTES = st.tuples(
    st.sampled_from(["flip", "cut", "drop", "put", "twice", "swap"]),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.sampled_from(TEXTS) | st.binary(max_size=8),
)
NODES = st.tuples(st.sampled_from(["set", "set", "set", "drop", "name"]), st.integers(0, 10**6), st.sampled_from(ODD))


def changed_bytes(data: bytes, changes: list[tuple[str, int, int, bytes]]) -> bytes:
    """The data after each of the changes."""
    for kind, one, other, text in changes:
        at = one % (len(data) + 1)
        upto = min(len(data), at + other % 64)
        if kind == "flip" and data:
            at %= len(data)
            data = data[:at] + bytes([data[at] ^ (1 << other % 8)]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "drop":
            data = data[:at] + data[upto:]
        elif kind == "put":
            data = data[:at] + text + data[at:]
        elif kind == "twice":
            data = data[:upto] + data[at:]
        elif kind == "swap":
            data = data[at:] + data[:at]
    return data


def changed_json(value: Any, changes: list[tuple[str, int, Any]]) -> Any:
    """The value with other nodes: set to something odd, left out, or under another name."""
    value = copy.deepcopy(value)
    for kind, place, odd in changes:
        nodes = list(_nodes(value))
        if not nodes:
            return odd
        holder, key = nodes[place % len(nodes)]
        if kind == "set":
            holder[key] = copy.deepcopy(odd)
        elif kind == "drop":
            del holder[key]
        elif isinstance(holder, dict):
            holder[odd if isinstance(odd, str) else "other"] = holder.pop(key)
    return value


def _nodes(value: Any) -> Any:
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict | list):
            for key in list(each) if isinstance(each, dict) else range(min(len(each), 20)):
                yield each, key
                waiting.append(each[key])


def changed(good: bytes, is_json: bool) -> st.SearchStrategy[bytes]:
    """Good bytes, changed; of JSON as often its values as its text."""
    byte_wise = st.lists(BYTES, min_size=1, max_size=3).map(lambda changes: changed_bytes(good, changes))
    others = byte_wise | st.sampled_from(TEXTS)
    if not is_json:
        return others
    value = json.loads(good)
    nodes = st.lists(NODES, min_size=1, max_size=3).map(
        lambda changes: json.dumps(changed_json(value, changes)).encode()
    )
    return nodes | others
