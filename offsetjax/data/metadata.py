"""Tables of captions in a folder of pictures: `metadata.jsonl`, `.csv`, `.tsv`, `.json` and `.parquet`.

A row has `file_name`, the picture's name relative to the table, and its caption as `captions.py` says. A `.json` is a
list of rows, or maps names to rows, as the `meta_cap.json` of kohya's scripts does; there a row's `caption` is followed
by its `tags`, and a name may lack its suffix. Several rows of one picture are its several captions.
"""

import csv
import os
import pathlib
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from offsetjax.data.captions import FIELDS, captions_of
from offsetjax.data.items import SUFFIXES, Dropped
from offsetjax.errors import Status, kind_of, one_line
from offsetjax.json_text import parse_json, parse_object

_NAMES = re.compile(r"metadata\.(jsonl|csv|tsv|json|parquet)|meta_(cap|cap_dd|clean|lat)\.json")
_PICTURE = ("file_name", "filename", "image", "file", "path")  # the first that is there is the picture's name
_MAX_LINE = 2**20


@dataclass(frozen=True)
class Row:
    """A row of a metadata file: where it is, the picture's name relative to the file, and its captions."""

    place: str
    file_name: str
    captions: tuple[str, ...]


Rows = Iterator[Row | tuple[str, str]]


def is_metadata(name: str) -> bool:
    """Whether a file of that name is such a table."""
    return bool(_NAMES.fullmatch(name.lower()))


def read_metadata(file: pathlib.Path, place: str) -> Rows:
    """The rows of such a table; of one that is none, its place and the reason.

    Args:
        place: how the file is called.
    """
    return _READERS[file.suffix.lower()](file, place)


def _json_lines(file: pathlib.Path, place: str) -> Rows:
    number, is_inside = 0, False
    with file.open("rb") as lines:
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
                fields = parse_object(line, takes_nan=True)  # scores, as Python and img2dataset write them
            except UnicodeDecodeError:
                yield here, "not UTF-8 text"
            except ValueError as error:
                yield here, f"not a JSON object on one line: {error}"
            else:
                yield _row(fields, here)


def _json(file: pathlib.Path, place: str) -> Rows:
    """A list of rows, or kohya's map of them."""
    try:
        value = parse_json(file.read_bytes(), takes_nan=True)
    except UnicodeDecodeError:
        yield place, "not UTF-8 text"
        return
    except ValueError as error:
        yield place, f"not JSON: {error}"
        return
    if isinstance(value, list):
        rows = [(f"{place}:{number}", each) for number, each in enumerate(value, start=1)]
    elif isinstance(value, dict) and any(_is_named(name, each) for name, each in value.items()):
        rows = [(f"{place}: {name[:80]}", _of_kohya(name, each)) for name, each in value.items()]
    else:
        yield place, "neither a list of rows nor an object that maps names to them"
        return
    for here, fields in rows:
        yield _row(fields, here) if isinstance(fields, dict) else (here, "a row is an object, with the caption in it")


def _is_named(name: str, value: Any) -> bool:
    return isinstance(value, dict) or name.lower().endswith(tuple(SUFFIXES))


def _of_kohya(name: str, fields: Any) -> Any:
    if isinstance(fields, str):
        return {"file_name": name, "caption": fields}
    if not isinstance(fields, dict):
        return fields
    caption, tags = fields.get("caption"), fields.get("tags")
    both = {"caption": f"{caption}, {tags}"} if isinstance(caption, str) and isinstance(tags, str) and tags else {}
    return {**fields, **both, "file_name": name}


def _separated(delimiter: str, file: pathlib.Path, place: str) -> Rows:
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        reader = csv.DictReader(text, delimiter=delimiter)
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except (csv.Error, ValueError) as error:
                yield f"{place}:{reader.line_num}", f"not a row of CSV: {error}"
                continue
            named = {name: value for name, value in fields.items() if isinstance(name, str)}
            row = _row(named, f"{place}:{reader.line_num}")
            yield row if isinstance(row, Row) or "surrogate" not in row[1] else (row[0], "not UTF-8 text")


def _parquet(file: pathlib.Path, place: str) -> Rows:
    import pyarrow.parquet

    count = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            wanted = [name for name in table.schema_arrow.names if name in (*_PICTURE, *FIELDS, "tags")]
            for batch in table.iter_batches(1024, columns=wanted):
                for fields in batch.to_pylist():
                    count += 1
                    yield _row(fields, f"{place}:{count}")
    except Exception as error:  # of bytes that have changed Arrow's readers raise many kinds
        if kind_of(error) == Status.TRANSIENT:
            raise
        yield f"{place}:{count + 1}", f"not a table in Parquet: {one_line(error)}"


_READERS: dict[str, Callable[[pathlib.Path, str], Rows]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": partial(_separated, ","),
    ".tsv": partial(_separated, "\t"),
    ".parquet": _parquet,
}


def _row(fields: Mapping[str, Any], place: str) -> Row | tuple[str, str]:
    name = next((fields[each] for each in _PICTURE if fields.get(each) is not None), None)
    if not isinstance(name, str) or not name.strip("\0"):
        return place, "no file_name: a line is like " + '{"file_name": "a.png", "text": "A windmill."}'
    try:
        return Row(place, name, captions_of(fields))
    except Dropped as error:
        return place, str(error)


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
