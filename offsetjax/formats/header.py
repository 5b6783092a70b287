"""The header of a safetensors file: what it says is checked in full before anything is read by it.

The file is: the length of the header (8 bytes, little-endian), the header (JSON, padded with spaces), the bytes of the
tensors. The header gives each tensor's dtype, its shape and its place among these bytes, without gaps; `__metadata__`
holds strings. https://github.com/huggingface/safetensors
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from offsetjax.errors import one_line
from offsetjax.json_text import parse_object

MAX_BYTES = 100_000_000  # as in the safetensors library
MAX_TENSORS = 2**16  # the largest models have a few thousand in a file

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: from byte `begin` to before `end`, counted from the end of the header."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def parse_header(text: bytes) -> tuple[list[Entry], dict[str, str]]:
    """The tensors in the order of their bytes, and the metadata.

    Raises:
        ValueError: it is no header, or its tensors do not lie one after the other.
    """
    # Counted before anything is made of them: a header of 60 MB would be 1.4 GB of objects.
    if (count := text.count(b'"data_offsets"')) > MAX_TENSORS:
        raise ValueError(f"{count} tensors, more than {MAX_TENSORS}")
    try:
        header = parse_object(text)
        metadata = header.pop("__metadata__", None) or {}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ holds more than strings")
        entries = [_entry(name, **values) for name, values in header.items()]
    except (ValueError, TypeError, AttributeError) as error:  # also JSON of another structure
        raise ValueError(one_line(error)) from error  # names may be of any length
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    end = 0
    for entry in entries:
        if entry.begin != end:
            raise ValueError(f"{entry.name[:80]!r} begins at byte {entry.begin}, not {end}")
        end = entry.end
    return entries, metadata


def _entry(name: str, *, dtype: str, shape: list[int], data_offsets: list[int]) -> Entry:
    if not name or ".." in name or any(letter in "/\\" or ord(letter) < 32 for letter in name):
        raise ValueError(f"{name!r} is no name of a tensor")
    if dtype not in _DTYPES:
        raise ValueError(f"{name} has the unknown dtype {dtype}")
    begin, end = data_offsets
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"{name} has shape {shape} and bytes {data_offsets}")
    if math.prod(shape) * _DTYPES[dtype].itemsize != end - begin:
        raise ValueError(f"{name} of shape {shape} and dtype {dtype} has {end - begin} bytes")
    return Entry(name, _DTYPES[dtype], tuple(shape), begin, end)


def format_header(entries: Iterable[Entry], metadata: Mapping[str, str], ending: bytes = b"") -> bytes:
    """The header with its length before it, padded so that the tensors begin at a multiple of 8 bytes.

    Args:
        ending: further spaces that it ends with.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for entry in entries:
        header[entry.name] = {
            "dtype": _CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [entry.begin, entry.end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text + ending) % 8) + ending
    return len(text).to_bytes(8, "little") + text
