"""Data sets of TFDS in ArrayRecord, opened for random access with no tensorflow."""

import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from jaxtyping import Int

from offsetjax.data.cache import DESCRIPTION, read_cache
from offsetjax.data.features import CaptionOf, caption_of, check_features, text
from offsetjax.data.record import Picture
from offsetjax.data.shards import REPEATS_FILE, SIZES_FILE
from offsetjax.data.sizes import sizes_of
from offsetjax.data.source import USUAL, Features, Source
from offsetjax.errors import StorageError, TransientError, UserError, one_line
from offsetjax.json_text import parse_json, parse_object
from offsetjax.storage.retry import retried


@dataclass(frozen=True)
class Rows:
    """The records of one split as TFDS gives them, and which records of which files they are.

    Attributes:
        ranges: file, number of the first record and of the one after the last.
    """

    path: str
    split: str
    num_bytes: int
    records: Any
    ranges: tuple[tuple[str, int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return retried(lambda: self.records[int(index)], f"data: record {index} of {self.label}")
        except (TransientError, StorageError):
            raise
        except Exception as error:  # the reader's own errors, of several libraries, for bytes that have changed
            raise UserError(
                f"data: record {index} of {self.label} cannot be read: {one_line(error)}; "
                "the file is damaged: copy it again, or build the data set again"
            ) from error

    @property
    def label(self) -> str:
        return f"{self.path} ({self.split})"

    def overlaps(self, other: "Rows") -> bool:
        """Whether a record is in both."""
        return any(
            file == other_file and max(first, other_first) < min(last, other_last)
            for file, first, last in self.ranges
            for other_file, other_first, other_last in other.ranges
        )

    def fingerprint(self) -> dict[str, Any]:
        """Their number, split and size."""
        return {"num_examples": len(self), "num_bytes": self.num_bytes, "split": self.split}


@dataclass(frozen=True)
class TfdsPictures:
    """A source of pictures: the features of a picture and its caption, and `name` where there is one.

    Attributes:
        image: the name of the feature.
        caption: where the captions are.
        order: the number of each example's row, where some are seen several times in an epoch; empty: each once.
    """

    rows: Rows
    image: str
    caption: CaptionOf
    order: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        return self.rows.label

    def __len__(self) -> int:
        return len(self.order) or len(self.rows)

    def __getitem__(self, index: int) -> Picture:
        row = self.rows[self.order[index] if self.order else index]
        try:
            first, *others = self.caption.read(row)
        except LookupError as error:
            raise UserError(f"data: record {index} of {self.label} {error.args[0]}") from None
        return Picture(row[self.image], first, text(row.get("name", b"")), tuple(others))

    def sizes(self) -> Int[np.ndarray, "n 2"]:
        """Width and height of each picture: as `offsetjax data build` noted them, or from the pictures' headers.

        Raises:
            UserError: the note is damaged, or a picture cannot be read.
        """
        sizes = noted_sizes(self.rows)
        if sizes is None:
            sizes = sizes_of(self)
        return sizes[list(self.order)] if self.order else sizes

    def fingerprint(self) -> dict[str, Any]:
        return {**self.rows.fingerprint(), "num_examples": len(self)}

    def shares_records(self, other: Source) -> bool:
        return isinstance(other, TfdsPictures) and self.rows.overlaps(other.rows)


def open_pictures(path: str, split: str = "train", features: Features = USUAL) -> TfdsPictures:
    """Opens pictures: what `offsetjax data build` wrote, or the version folder of another TFDS data set.

    Args:
        split: a split by TFDS's rules: `train`, `train[:90%]`.
        features: those that are read.

    Raises:
        UserError: no data set, a damaged one, another format, other features, an unknown or empty split; or latents.
    """
    folder = version_folder(path)
    if cache := read_cache(folder):
        raise UserError(
            f"data: {folder} has the latents of pictures, not the pictures; train from them with "
            f"data.cached_latents=True, or give {cache.source}"
        )
    kinds = {features.image: "image", features.caption: "caption"}
    rows = open_rows(folder, split, kinds, {features.image: tfds.decode.SkipDecoding()})
    caption = caption_of(folder, _builder(folder).info.features, features)
    return TfdsPictures(rows, features.image, caption, _order(folder, rows))


def _order(folder: epath.Path, rows: Rows) -> tuple[int, ...]:
    """The rows as often as `repeats.json` says, which `offsetjax data build` writes for kohya's folders."""
    file = folder / REPEATS_FILE
    if not file.exists():
        return ()
    try:
        times = {
            split: np.repeat([each for _, each in runs], [count for count, _ in runs])
            for split, runs in parse_object(file.read_bytes()).items()
        }
        splits = _builder(folder).info.splits
        seen = [times_of for each in rows.ranges for times_of in _times(each, times, splits)]
        return tuple(np.repeat(np.arange(len(rows)), seen).tolist())
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise UserError(f"data: {file} is damaged ({one_line(error)}); build the data set again") from error


def noted_sizes(rows: Rows) -> Int[np.ndarray, "n 2"] | None:
    """Width and height of each row's picture from `sizes.npz`; None where there is none.

    Raises:
        UserError: it is damaged.
    """
    folder = epath.Path(rows.path)
    file = folder / SIZES_FILE
    if not file.exists():
        return None
    content, splits = file.read_bytes(), _builder(folder).info.splits
    try:
        with np.load(io.BytesIO(content)) as stored:
            by_split = {split: stored[split] for split in stored.files}
        parts = [_of_part(each, by_split, splits) for each in rows.ranges]
        sizes = np.concatenate([part for part in parts if part is not None]).astype(np.int32)
        if sizes.shape != (len(rows), 2) or sizes.min() < 0:
            raise ValueError(f"sizes of the shape {sizes.shape} for {len(rows)} pictures")
    except Exception as error:  # NumPy, zipfile and zlib raise many kinds for bytes that have changed
        raise UserError(f"data: {file} is damaged ({one_line(error)}); build the data set again") from error
    return sizes


def _times(part: tuple[str, int, int], times: Mapping[str, Any], splits: Mapping[str, Any]) -> list[int]:
    """How often each of the records from `first` up to `last` of a shard is seen."""
    found = _of_part(part, times, splits)
    return [1] * (part[2] - part[1]) if found is None else found.tolist()


def _of_part(part: tuple[str, int, int], by_split: Mapping[str, Any], splits: Mapping[str, Any]) -> Any:
    """Of what is known of each record of a split, that of the records from `first` up to `last` of a shard."""
    path, first, last = part
    match = re.fullmatch(r".*-(.+)\.array_record-(\d+)-of-\d+", epath.Path(path).name)
    if not match or match[1] not in by_split:
        return None
    before = sum(splits[match[1]].shard_lengths[: int(match[2])])
    return by_split[match[1]][before + first : before + last]


def open_rows(
    folder: epath.Path, split: str, kinds: Mapping[str, str], decoders: Mapping[str, Any] | None = None
) -> Rows:
    """Opens a version folder that must have features of these names and kinds (`check_features`).

    Raises:
        UserError: as for `open_pictures`.
    """
    builder = _builder(folder)
    check_features(folder, builder.info.features or {}, kinds)
    try:
        info = builder.info.splits[split]
        num_bytes = int(info.num_bytes)
        records = builder.as_data_source(split, decoders=decoders)
    except NotImplementedError:
        raise UserError(f"data: {folder} is not in ArrayRecord; prepare it with file_format='array_record'") from None
    except Exception as error:  # TFDS raises several kinds for a split that it cannot parse or find
        known = ", ".join(builder.info.splits)
        raise UserError(f"data: {folder} has no split {split!r}; it has {known}") from error
    if not len(records):
        raise UserError(f"data: the split {split!r} of {folder} is empty")
    ranges = [(str(each.filename), each.skip, each.skip + each.take) for each in info.file_instructions]
    return Rows(str(folder), split, num_bytes, records, tuple(ranges))


def _builder(folder: epath.Path) -> tfds.core.DatasetBuilder:
    _check_classes(folder)
    try:
        return tfds.builder_from_directory(folder)
    except OSError:  # the disk or the network, not what is written there
        raise
    except Exception as error:  # TFDS and its parsers raise several kinds
        raise UserError(
            f"data: {folder} cannot be opened: {one_line(error)}; its dataset_info.json or its features.json is "
            "damaged: copy them again, or build the data set again"
        ) from error


def _check_classes(folder: epath.Path) -> None:
    """Refuses features that are not TFDS's own: it imports the classes that a data set names, which runs their code.

    Raises:
        UserError: such a class, before anything is imported.
    """
    file = folder / "features.json"
    if not file.exists():
        return
    try:
        described = parse_json(file.read_bytes())
    except ValueError:
        return  # TFDS says what is wrong with it
    for name in _class_names(described):
        if not isinstance(name, str) or not re.fullmatch(r"tensorflow_datasets\.core\.features(\.\w+)+", name):
            raise UserError(
                f"data: {file} asks for the class {str(name)[:80]!r}, whose code would be run to read the data; only "
                "TFDS's own features are read: prepare the data with these"
            )


def _class_names(described: Any) -> Iterator[Any]:
    """The Python classes that a description of features names, at any depth."""
    if isinstance(described, Mapping):
        for key, value in described.items():
            if key in ("pythonClassName", "python_class_name", "type"):
                yield from [value] if not isinstance(value, Mapping | list) else []
            yield from _class_names(value)
    elif isinstance(described, list):
        for each in described:
            yield from _class_names(each)


def version_folder(path: epath.PathLike) -> epath.Path:
    """The folder with `dataset_info.json`: `path`, or the only one in the two levels below.

    Raises:
        UserError: none, or several.
    """
    found = _find(path, "dataset_info.json")
    if not found:
        if unfinished := _find(path, DESCRIPTION):
            raise UserError(
                f"data: {unfinished[0].parent} has an unfinished cache of latents; continue it with the same "
                "`offsetjax data encode`"
            )
        raise UserError(f"data: {str(path)!r} holds no data set; make one with `offsetjax data build`")
    if len(found) > 1:
        names = ", ".join(str(file.parent) for file in found)
        raise UserError(f"data: {path} holds several data sets; give one of {names}")
    return found[0].parent


def _find(path: epath.PathLike, name: str) -> list[epath.Path]:
    """The files of a name in the first of a folder and the two levels below that has any."""
    patterns = (name, f"*/{name}", f"*/*/{name}") if str(path) else ()
    return next((files for pattern in patterns if (files := sorted(epath.Path(path).glob(pattern)))), [])
