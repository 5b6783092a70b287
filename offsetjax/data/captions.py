"""Captions that lie beside pictures: `metadata.jsonl`, `metadata.csv`, and a file for each picture.

Of a file that holds several fields, a caption is `text`, `caption` or `prompt`, the first that is there, or a list of
texts for several captions; `captions` is one too.
"""

import csv
import os
import pathlib
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, TextIO

from offsetjax.data.items import MAX_CAPTION_BYTES, Dropped
from offsetjax.json_text import parse_object

# Which lines of a text file are captions: kohya's scripts read the first, others the whole, or each as one.
TextLines = Literal["whole", "first", "each"]

METADATA = ("metadata.jsonl", "metadata.csv")
SIDE_SUFFIXES = (".txt", ".caption", ".json")  # the first that is there is read
_FIELDS = ("text", "caption", "prompt", "captions")
_MAX_LINE = 2**20


@dataclass(frozen=True)
class Row:
    """A row of a metadata file: where it is, the picture's name relative to the file, and its captions."""

    place: str
    file_name: str
    captions: tuple[str, ...]


def captions_of(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """The captions among the fields of a picture, stripped; none is an empty tuple.

    Raises:
        Dropped: what has the name of a caption is no text, or cannot be written.
    """
    value = next((fields[name] for name in _FIELDS if fields.get(name) is not None), "")
    several = value if isinstance(value, list | tuple) else [value]
    for each in several:
        if not isinstance(each, str):
            raise Dropped(f"the caption is no text: {str(each)[:40]!r}")
    return tuple(_checked(each) for each in several if each.strip())


def _checked(caption: str) -> str:
    if len(caption) > MAX_CAPTION_BYTES:
        raise Dropped(f"the caption is longer than {MAX_CAPTION_BYTES} characters")
    try:
        caption.encode()
    except UnicodeEncodeError:
        raise Dropped("the caption cannot be written: it has half of a surrogate pair") from None
    return caption.strip()


def read_metadata(file: pathlib.Path, place: str) -> Iterator[Row | tuple[str, str]]:
    """The rows of a `metadata.jsonl` or `metadata.csv`; of one that is none, its place and the reason.

    Args:
        place: how the file is called.
    """
    if file.suffix.lower() == ".csv":
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            yield from _csv_rows(text, place)
    else:
        with file.open("rb") as lines:
            yield from _json_rows(lines, place)


def _json_rows(lines: BinaryIO, place: str) -> Iterator[Row | tuple[str, str]]:
    number, is_inside = 0, False
    while line := lines.readline(_MAX_LINE):
        number += not is_inside
        was_inside, is_inside = is_inside, not line.endswith(b"\n") and len(line) == _MAX_LINE
        if was_inside or not line.strip():
            continue
        here = f"{place}:{number}"
        if is_inside:
            yield here, f"not a caption: a line longer than {_MAX_LINE} bytes"
            continue
        try:
            yield _row(parse_object(line, takes_nan=True), here)  # scores, as Python and img2dataset write them
        except UnicodeDecodeError:
            yield here, "not UTF-8 text"
        except ValueError as error:
            yield here, f"not a JSON object on one line: {error}"
        except Dropped as error:
            yield here, str(error)


def _csv_rows(text: TextIO, place: str) -> Iterator[Row | tuple[str, str]]:
    reader = csv.DictReader(text)
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except (csv.Error, ValueError) as error:
            yield f"{place}:{reader.line_num}", f"not a row of CSV: {error}"
            continue
        here = f"{place}:{reader.line_num}"
        try:
            yield _row({name: value for name, value in fields.items() if isinstance(name, str)}, here)
        except Dropped as error:
            yield here, "not UTF-8 text" if "surrogate" in str(error) else str(error)


def _row(fields: Mapping[str, Any], place: str) -> Row:
    name = fields.get("file_name")
    if not isinstance(name, str) or not name.strip("\0"):
        raise Dropped("no file_name: a line is like " + '{"file_name": "a.png", "text": "A windmill."}')
    return Row(place, name, captions_of(fields))


def read_side_file(file: pathlib.Path, lines: TextLines) -> tuple[str, ...]:
    """The captions in the file of one picture; none where it holds none.

    Raises:
        Dropped: it is too long, or not what its suffix says.
    """
    with file.open("rb") as opened:
        content = opened.read(MAX_CAPTION_BYTES + 1)
    if len(content) > MAX_CAPTION_BYTES:
        raise Dropped(f"the caption's file is longer than {MAX_CAPTION_BYTES} bytes")
    try:
        if file.suffix.lower() == ".json":
            return captions_of(parse_object(content, takes_nan=True))
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Dropped("the caption's file is not UTF-8 text") from None
    except ValueError as error:
        raise Dropped(f"the caption's file is not a JSON object: {error}") from None
    kept = _LINES[lines](text.replace("\r\n", "\n"))
    return captions_of({"captions": kept})


_LINES: dict[str, Callable[[str], list[str]]] = {
    "whole": lambda text: [text],
    "first": lambda text: [line for line in text.split("\n") if line.strip()][:1],
    "each": lambda text: [line for line in text.split("\n") if line.strip()],
}


def same_name(name: str) -> str:
    """The form in which names are compared: systems write the same accent as one character or as two."""
    return unicodedata.normalize("NFC", name)


def inside(folder: pathlib.PurePosixPath, file_name: str, root: str | os.PathLike) -> str:
    """The name relative to the root of what a metadata file in `folder` calls `file_name`.

    Raises:
        Dropped: it leads out of the root.
    """
    text = file_name if "\\" not in file_name else file_name.replace("\\", "/")
    path = pathlib.PurePosixPath(text)
    if path.is_absolute() and path.is_relative_to(os.path.abspath(root)):  # noqa: PTH100 - links stay as they are
        path = path.relative_to(os.path.abspath(root))  # noqa: PTH100
        folder = pathlib.PurePosixPath()
    if path.is_absolute() or pathlib.PureWindowsPath(file_name).drive or ".." in path.parts or not path.parts:
        raise Dropped(f"its file_name leads out of the folder: {file_name[:80]!r}")
    return (folder / path).as_posix()
