"""A training's record in its work directory: a line of JSON for each logged step, and the pictures in `samples/`.

Each line ends with its CRC-32. A value that is not finite is the text "NaN", "Infinity" or "-Infinity", as protobuf's
JSON has it. On a disk the record is `metrics.jsonl`, to which lines are appended. Object stores cannot append: there it
is in parts, `metrics.jsonl`, `metrics.00001.jsonl` and so on, of which the last is written anew.
"""

import json
import logging
import math
import re
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

from offsetjax.files import is_remote, write_whole
from offsetjax.json_text import parse_object
from offsetjax.sampling.pictures import Picture, write_samples

_log = logging.getLogger("offsetjax")
_FIRST = "metrics.jsonl"
_PART = 256  # lines
_UNREADABLE = "metrics.unreadable"


class JsonLines:
    """Writes `metrics.jsonl` and `samples/`.

    Lines of steps that a resumed run writes again are dropped when it opens: those after `start_step`, and all at 0.
    Lines that cannot be read are set aside in `metrics.unreadable`.
    """

    def __init__(self, workdir: epath.Path, start_step: int, num_steps: int):
        del num_steps
        self._workdir = workdir
        log = read_log(workdir)
        if unreadable := [*log.unreadable.values(), *([log.torn] if log.torn else [])]:
            _set_aside(workdir, unreadable)
        kept = [line for line in log.lines if start_step and line.step <= start_step]
        contents = [line.content for line in kept]
        self._record = _Parts(workdir, contents) if is_remote(workdir) else _File(workdir, contents)
        self._began = time.monotonic()
        self._seconds_before = max((line.values.get("time_seconds", 0.0) for line in kept), default=0.0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A line; its `time_seconds` is the training's wall-clock, resumptions included."""
        elapsed = round(self._seconds_before + time.monotonic() - self._began, 3)
        line = {"step": step, **{name: _to_json(value) for name, value in values.items()}, "time_seconds": elapsed}
        self._record.append(_signed(json.dumps(line, allow_nan=False).encode()))

    def images(self, step: int, name: str, pictures: Sequence[Picture], about: Mapping[str, Any]) -> None:
        del step
        write_samples(self._workdir / "samples", name, pictures, about)

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Line:
    """One line of a record: its bytes and what they say."""

    content: bytes
    step: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Log:
    """A record: its lines, those that are none by their numbers, and a last one without an end.

    The last may be of a process that is still writing.
    """

    lines: Sequence[Line]
    unreadable: Mapping[int, bytes]
    torn: bytes = b""


def read_log(workdir: epath.PathLike) -> Log:
    """Reads the record of a work directory, whole or in parts; nothing that is written there is an error."""
    content = b"".join(file.read_bytes() for file in _files(epath.Path(workdir)))
    *whole, torn = content.split(b"\n")
    lines: list[Line] = []
    unreadable = {}
    for number, each in enumerate(whole, start=1):
        try:
            lines.append(_parse(each + b"\n"))
        except ValueError:
            unreadable[number] = each
    return Log(lines, unreadable, torn)


def _signed(line: bytes) -> bytes:
    """The line with the CRC-32 of the rest as its last field, `crc`: a bit that flips in a digit is another loss."""
    return line[:-1] + b', "crc": "%08x"}\n' % zlib.crc32(line)


_SIGNATURE = re.compile(rb', "crc": "([0-9a-f]{8})"\}\n$')


def _parse(content: bytes) -> Line:
    """Raises a ValueError where it is no line of a record."""
    values = parse_object(content, takes_nan=True)  # older versions wrote NaN as Python does
    if "crc" in values:  # nor had they this
        signature = _SIGNATURE.search(content)
        if not signature or int(signature[1], 16) != zlib.crc32(content[: signature.start()] + b"}"):
            raise ValueError("not as it was written")
        del values["crc"]
    step = values.pop("step", None)
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError("no step")
    return Line(content, step, {name: _from_json(value) for name, value in values.items()})


_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _to_json(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _from_json(value: Any) -> float:
    """Raises a ValueError where it is no number."""
    if isinstance(value, str) and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("not a number")
    return float(value)


def _files(workdir: epath.Path) -> list[epath.Path]:
    """The parts of a record that are there, in their order."""
    first = workdir / _FIRST
    return [file for file in (first, *sorted(workdir.glob("metrics.[0-9]*.jsonl"))) if file.exists()]


def _part(workdir: epath.Path, number: int) -> epath.Path:
    return workdir / (f"metrics.{number:05}.jsonl" if number else _FIRST)


def _set_aside(workdir: epath.Path, lines: Sequence[bytes]) -> None:
    file = workdir / _UNREADABLE
    before = file.read_bytes() if file.exists() else b""
    write_whole(file, before + b"".join(line + b"\n" for line in lines))
    _log.warning("%s: %d lines of the training's record cannot be read; they are now in %s", workdir, len(lines), file)


class _File:
    """A record on a disk."""

    def __init__(self, workdir: epath.Path, contents: Sequence[bytes]):
        self._file, self._unwritten, self._size = _part(workdir, 0), b"", -1
        write_whole(self._file, b"".join(contents))
        for file in _files(workdir)[1:]:  # parts, of a record that was copied from a bucket
            file.unlink()

    def append(self, line: bytes) -> None:
        """Appends a line, and those before it that could not be written."""
        self._unwritten += line
        with self._file.open("ab") as file:
            if self._size < 0:  # what a full disk took of a line is not its beginning
                self._size = file.tell()
            file.truncate(min(self._size, file.tell()))
            file.write(self._unwritten)
            file.flush()
        self._unwritten, self._size = b"", -1


class _Parts:
    """A record on an object store."""

    def __init__(self, workdir: epath.Path, contents: Sequence[bytes]):
        self._workdir = workdir
        parts = [list(contents[at : at + _PART]) for at in range(0, len(contents), _PART)] or [[]]
        for number, file in reversed(list(enumerate(_files(workdir)))):  # the last first: what is left is a beginning
            if number >= len(parts):
                file.unlink()
        for number, part in enumerate(parts):
            file, content = _part(workdir, number), b"".join(part)
            if not file.exists() or file.read_bytes() != content:
                write_whole(file, content)
        self._number, self._last, self._is_written = len(parts) - 1, parts[-1], True

    def append(self, line: bytes) -> None:
        """Writes the last part anew, or begins another."""
        if len(self._last) >= _PART and self._is_written:
            self._number, self._last = self._number + 1, []
        self._last.append(line)
        self._is_written = False
        write_whole(_part(self._workdir, self._number), b"".join(self._last))
        self._is_written = True
