"""A data set that is opened for random access: TFDS, in ArrayRecord, with no tensorflow."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from offsetjax.data.cache import DESCRIPTION, Cache, read_cache
from offsetjax.data.images import UnreadableImage, decode, resize_and_crop, time_ids
from offsetjax.errors import UserError, one_line


@dataclass(frozen=True)
class Source:
    """Random access to the records of one split: `source[i]` is `{"image": bytes, "caption": str, "name": str}`.

    Where `cache` says what they were made of, they are latents: in the place of the image is what
    `offsetjax.data.cache` describes.
    """

    path: str
    split: str
    num_bytes: int
    records: Any
    ranges: tuple[tuple[str, int, int], ...] = ()  # file, first record and the one after the last
    cache: Cache | None = None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            record = self.records[int(index)]
        except Exception as error:  # the reader's own errors, of several libraries, for bytes that have changed
            raise UserError(
                f"data: record {index} of {self.path} ({self.split}) cannot be read: {one_line(error)}; "
                "the file is damaged: copy it again, or build the data set again"
            ) from error
        return {**record, "caption": _text(record["caption"]), "name": _text(record.get("name", b""))}

    def shares_records(self, other: "Source") -> bool:
        """Whether a record is in both."""
        return any(
            file == other_file and max(first, other_first) < min(last, other_last)
            for file, first, last in self.ranges
            for other_file, other_first, other_last in other.ranges
        )

    def decoded(self, index: int) -> dict[str, Any]:
        """A record with its picture decoded: `pixels` uint8 `[h, w, 3]`, `caption` and `name`.

        Raises:
            UserError: it cannot be read or decoded.
        """
        record = self[index]
        try:
            pixels = decode(record["image"])
        except UnreadableImage as error:
            raise UserError(
                f"data: {self.describe(index)} is no picture: {error}; "
                "build the data set again with `offsetjax data build`"
            ) from error
        return {"pixels": pixels, "caption": record["caption"], "name": record["name"]}

    def cropped(self, index: int, resolution: int) -> dict[str, Any]:
        """A record as training sees it: `pixels` uint8 `[r, r, 3]`, `time_ids` float32 `[6]`, `caption` and `name`.

        Raises:
            UserError: it cannot be read or decoded.
        """
        record = self.decoded(index)
        height, width, _ = record["pixels"].shape
        pixels = resize_and_crop(record["pixels"], resolution)
        return {**record, "pixels": pixels, "time_ids": time_ids(height, width, resolution)}

    def describe(self, index: int) -> str:
        """Which record of which data set it is, for a message."""
        name = self[index]["name"]
        return f"record {index} ({name or 'without a name'}) of {self.path} ({self.split})"


def open_source(path: epath.PathLike, split: str = "train", cached_latents: bool = False) -> Source:
    """Opens a data set for random access.

    Args:
        path: what `offsetjax data build` wrote, or the version folder of any TFDS data set in ArrayRecord with the
            features `image` and `caption`.
        split: a split by TFDS's rules: `train`, `train[:90%]`.
        cached_latents: it is what `offsetjax data encode` wrote instead.

    Raises:
        UserError: no data set, a damaged one, another format, other features, an unknown or empty split, or one of
            latents that is cut by shards; latents for pictures, or pictures for latents.
    """
    folder = version_folder(path)
    cache = read_cache(folder)
    if cache and not cached_latents:
        raise UserError(
            f"data: {folder} has the latents of pictures, not the pictures; train from them with "
            f"data.cached_latents=True, or give {cache.source}"
        )
    if cached_latents and not cache:
        raise UserError(
            f"data: {folder} has pictures, not their latents; encode them with `offsetjax data encode`, or set "
            "data.cached_latents=False"
        )
    if cache and re.search(r"\[[^]]*shard", split):
        raise UserError(
            f"data: the split {split!r} is cut by shards, which have other records in {folder} than in its pictures' "
            "data set; cut it by percents or numbers, such as 'train[:90%]'"
        )
    builder = _builder(folder)
    _check_features(folder, builder.info.features or {}, ("moments" if cache else "image", "caption"))
    try:
        info = builder.info.splits[split]
        num_bytes = int(info.num_bytes)
        records = builder.as_data_source(split, decoders=None if cache else {"image": tfds.decode.SkipDecoding()})
    except NotImplementedError:
        raise UserError(f"data: {folder} is not in ArrayRecord; prepare it with file_format='array_record'") from None
    except Exception as error:  # TFDS raises several kinds for a split that it cannot parse or find
        known = ", ".join(builder.info.splits)
        raise UserError(f"data: {folder} has no split {split!r}; it has {known}") from error
    if not len(records):
        raise UserError(f"data: the split {split!r} of {folder} is empty")
    files = [(str(each.filename), each.skip, each.skip + each.take) for each in info.file_instructions]
    return Source(str(folder), split, num_bytes, records, tuple(files), cache)


def _builder(folder: epath.Path) -> tfds.core.DatasetBuilder:
    try:
        return tfds.builder_from_directory(folder)
    except OSError:  # the disk or the network, not what is written there
        raise
    except Exception as error:  # TFDS and its parsers raise several kinds
        raise UserError(
            f"data: {folder} cannot be opened: {one_line(error)}; its dataset_info.json or its features.json is "
            "damaged: copy them again, or build the data set again"
        ) from error


def _check_features(folder: epath.Path, features: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raises a UserError unless the features of these names are there, and are what they are called."""
    for name in names:
        if name not in features:
            raise UserError(f"data: {folder} has no feature {name!r}; it must have {' and '.join(names)}")
        kind, is_kind = _FEATURES[name]
        if not is_kind(features[name]):
            found = " ".join(repr(features[name]).split())
            raise UserError(
                f"data: {folder} has the feature {name!r} as {found}, but it must be {kind}; prepare the data with one"
            )


def _is_text(feature: Any) -> bool:
    return isinstance(feature, tfds.features.Tensor) and (feature.shape, feature.np_dtype) == ((), np.object_)


# What a feature has to be, in TFDS's words, and whether it is: a class label or a list of texts is no caption.
_FEATURES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "image": ("an Image", lambda feature: isinstance(feature, tfds.features.Image)),
    "moments": ("a Tensor", lambda feature: isinstance(feature, tfds.features.Tensor)),
    "caption": ("a Text", _is_text),
}


def version_folder(path: epath.PathLike) -> epath.Path:
    """The folder with `dataset_info.json`: `path`, or the only one in the two levels below.

    Raises:
        UserError: none, or several.
    """
    found = _find(path, "dataset_info.json")
    if not found:
        if unfinished := _find(path, DESCRIPTION):
            raise UserError(
                f"data: {unfinished[0].parent} has an unfinished cache of latents; go on with it by the same "
                "`offsetjax data encode`"
            )
        raise UserError(f"data: {str(path)!r} holds no data set; make one with `offsetjax data build`")
    if len(found) > 1:
        names = ", ".join(str(file.parent) for file in found)
        raise UserError(f"data: {path} holds several data sets; give one of {names}")
    return found[0].parent


def split_names(split: str) -> set[str]:
    """The whole splits that a split is of: `train` and `test` for `train[:95%]+test`."""
    return {part.partition("[")[0].strip() for part in split.split("+")}


def captions(source: Source) -> list[str]:
    """The caption of every record, in the order of the source."""
    return [source[index]["caption"] for index in range(len(source))]


def _find(path: epath.PathLike, name: str) -> list[epath.Path]:
    """The files of a name in the first of a folder and the two levels below that has any."""
    patterns = (name, f"*/{name}", f"*/*/{name}") if str(path) else ()
    return next((files for pattern in patterns if (files := sorted(epath.Path(path).glob(pattern)))), [])


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
