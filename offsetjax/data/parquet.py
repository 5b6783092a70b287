"""Tables in Parquet with a picture a row, as Hugging Face's `datasets` and img2dataset write them.

A picture is bytes, or a struct with `bytes`, as `datasets` has it; a caption is a text, a list of texts, or a class,
whose name `datasets` notes in the file. Columns are found by their names, or given. A table is read in its order, a few
rows at a time, however large its row groups are.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from offsetjax.data.archives import Archive, Damaged, Reader, Settings, file_digest
from offsetjax.data.captions import FIELDS, captions_of, check_template, of_label
from offsetjax.data.folder import NO_CAPTION
from offsetjax.data.items import MAX_PICTURE_BYTES, Dropped, Item, Named
from offsetjax.data.opened import Opened
from offsetjax.errors import Status, UserError, kind_of, one_line
from offsetjax.json_text import parse_object

_PICTURES = ("image", "jpg", "png", "jpeg", "webp", "img", "picture", "image_bytes", "bytes", "content")
_LABELS = ("label", "class", "fine_label")
_ROWS = 16  # read at a time
_STATUS, _DOWNLOADED = "status", "success"  # img2dataset's


@dataclass(frozen=True)
class Columns:
    """Those that are read, and the names of the classes where the captions are numbers of these."""

    image: str
    caption: str
    classes: tuple[str, ...] = ()
    template: str = ""
    status: str = ""

    @property
    def names(self) -> list[str]:
        """Of all."""
        return [name for name in (self.image, self.caption, self.status) if name]


@dataclass(frozen=True)
class Table:
    """The rows of a table, from `first` up to `last`."""

    path: epath.Path
    name: str
    columns: Columns
    first: int
    last: int
    identity: str

    def __len__(self) -> int:
        return self.last - self.first

    def part(self, first: int, last: int) -> "Table":
        return Table(self.path, self.name, self.columns, self.first + first, self.first + last, self.identity)

    def digest(self) -> str:
        return self.identity

    def __iter__(self) -> Iterator[Named]:
        with Opened(self.path) as file:
            table, begin = _open(file), 0
            for group in range(table.num_row_groups):
                count = table.metadata.row_group(group).num_rows
                first, last = max(self.first - begin, 0), min(self.last - begin, count)
                if first < last:
                    yield from self._of_group(table, group, begin, first, last)
                begin += count

    def _of_group(self, table: pq.ParquetFile, group: int, begin: int, first: int, last: int) -> Iterator[Named]:
        """The rows of a row group, each where it is asked for."""
        at, reason = 0, ""
        try:
            for batch in table.iter_batches(_ROWS, row_groups=[group], columns=self.columns.names, use_threads=False):
                for row in range(max(first - at, 0), min(last - at, batch.num_rows)):
                    values = {name: batch.column(name)[row] for name in self.columns.names}
                    name = self._row_name(begin + at + row)
                    first = at + row + 1
                    yield Named(name, partial(self._item, name, values))
                at += batch.num_rows
                if at >= last:
                    return
        except Exception as error:  # of bytes that have changed Arrow's readers raise many kinds
            if kind_of(error) in (Status.TRANSIENT, Status.STORAGE):
                raise
            reason = one_line(error)
        for row in range(first, last):
            yield Named(self._row_name(begin + row), partial(_drop, f"the table cannot be read here: {reason}"))

    def _row_name(self, row: int) -> str:
        return f"{self.name}:{row + 1}"

    def _item(self, name: str, values: dict[str, Any]) -> Item:
        if self.columns.status and (status := _value(values[self.columns.status])) not in (_DOWNLOADED, None):
            raise Dropped(f"was not downloaded: {status}")
        image = _value(values[self.columns.image])
        if isinstance(image, dict):
            if image.get("bytes") is None and image.get("path"):
                raise Dropped(f"the table has the picture's path, not the picture: {str(image['path'])[:80]}")
            image = image.get("bytes")
        if not isinstance(image, bytes):
            raise Dropped("the picture is null")
        if len(image) > MAX_PICTURE_BYTES:
            raise Dropped(f"a file of more than {MAX_PICTURE_BYTES} bytes: {len(image)}")
        if not (captions := self._captions(_value(values[self.columns.caption]))):
            raise Dropped("empty caption")
        return Item(name, image, captions)

    def _captions(self, value: Any) -> Sequence[str]:
        if value is None:
            raise Dropped(f"{NO_CAPTION}: it is null")
        if self.columns.classes:
            if not isinstance(value, int) or not 0 <= value < len(self.columns.classes):
                raise Dropped(f"{NO_CAPTION}: {value} is no class")
            value = self.columns.classes[value].replace("_", " ")
        if self.columns.template and isinstance(value, str) and value.strip():
            value = of_label(self.columns.template, value)
        return captions_of(
            {"captions": [each for each in value if each is not None] if isinstance(value, list) else value}
        )


def _drop(reason: str) -> Item:
    raise Dropped(reason)


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        raise Dropped("not UTF-8 text") from None


def open_table(path: epath.Path, name: str, settings: Settings) -> Archive:
    """Reads the description of a table.

    Raises:
        Damaged: it is none, or cut.
        UserError: it has no columns of pictures and captions.
    """
    if settings.label_template:
        check_template("--label_template", settings.label_template)
    identity = file_digest(path, name, settings)
    with Opened(path) as file:
        try:
            table = _open(file)
            schema, count = table.schema_arrow, table.metadata.num_rows
        except Exception as error:  # as above
            if kind_of(error) in (Status.TRANSIENT, Status.STORAGE):
                raise
            raise Damaged(f"not a table in Parquet, or cut: {one_line(error)}") from error
    if not count:
        return Archive(Table(path, name, Columns("", ""), 0, 0, identity))
    return Archive(Table(path, name, _columns(name, schema, settings), 0, count, identity))


PARQUET = Reader(open_table, frozenset(("image_column", "caption_column", "label_template")))


def _open(file: Opened) -> pq.ParquetFile:
    # Pages are read as they are needed: a column of a row group may be larger than the memory.
    return pq.ParquetFile(file, buffer_size=2**20, pre_buffer=False, page_checksum_verification=True)


def _columns(name: str, schema: pa.Schema, settings: Settings) -> Columns:
    types = dict(zip(schema.names, schema.types, strict=True))
    image = settings.image_column or _first(types, _PICTURES, _is_picture) or _only(types, _is_picture)
    caption = settings.caption_column or _first(types, FIELDS, _is_caption)
    is_class = not caption and bool(settings.label_template)
    if is_class:
        caption = _first(types, _LABELS, lambda kind: _is_caption(kind) or pa.types.is_integer(kind))
    found = ", ".join(f"{each} ({kind})" for each, kind in types.items())[:300]
    for what, option, column, fits in (
        ("pictures", "image_column", image, _is_picture),
        ("captions", "caption_column", caption, lambda kind: _is_caption(kind) or pa.types.is_integer(kind)),
    ):
        if not column or column not in types:
            given = f"no column {column!r}" if column else f"no column of {what} by a usual name"
            raise UserError(f"data: {name} has {given}, only {found}; give --{option}=NAME")
        if not fits(types[column]):
            raise UserError(
                f"data: {name} has the column {column!r} of {types[column]}, which holds no {what}; of {found} give "
                f"another as --{option}"
            )
    classes = _classes(schema, caption) if pa.types.is_integer(types[caption]) else ()
    if pa.types.is_integer(types[caption]) and not classes:
        raise UserError(
            f"data: {name} has numbers in the column {caption!r} and no names of classes for them; give a column of "
            "texts as --caption_column"
        )
    template = settings.label_template if classes or is_class else ""
    if settings.label_template and not template:
        raise UserError(
            f"data: --label_template does not apply to {name}, whose captions are texts (column {caption!r}); leave it "
            "out, or give the column of the classes as --caption_column"
        )
    return Columns(image, caption, classes, template, _first(types, (_STATUS,), _is_text))


def _first(types: dict[str, pa.DataType], names: Sequence[str], fits: Any) -> str:
    """The first column of these names, in whatever case, that fits."""
    return next((name for each in names for name in types if name.lower() == each and fits(types[name])), "")


def _only(types: dict[str, pa.DataType], fits: Any) -> str:
    found = [name for name, kind in types.items() if fits(kind) and not pa.types.is_null(kind)]
    return found[0] if len(found) == 1 else ""


def _is_picture(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _is_picture(kind.field(index).type) and not pa.types.is_struct(kind.field(index).type)
    return any(is_kind(kind) for is_kind in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_null))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(is_kind(kind) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_null))


def _is_caption(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return _is_text(kind.value_type) if is_list else _is_text(kind)


def _classes(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """The names of the classes, as `datasets` notes them."""
    try:
        noted = parse_object((schema.metadata or {})[b"huggingface"])
        names = noted["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError, json.JSONDecodeError):
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()
