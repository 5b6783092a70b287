"""A cache of latents: what an autoencoder makes of each picture of a data set, encoded once.

It is a TFDS data set in ArrayRecord. A record has `moments` float16 `[v, 2, c, h, w]`, the mean and the log-variance of
the posterior, not scaled, of v views: the picture and, where training flips, its mirror image, whose latents are not
those of the picture mirrored; `time_ids` and the `brightness` of the cropped picture, which its latents do not show;
`caption` and `name`. The splits are those of the pictures, whole and in their order, so that `train[:90%]` means the
same records of both.

Of pictures of several sizes the last two axes are one, and `latent_size` has their lengths; one that fits none of the
sizes keeps its place, with no latents. `sizes.npz` has the sizes of the whole pictures, as in their own data set, so
that the batches that are planned for both are the same.

`latents.json` says what a cache was made of, and is its first file; `dataset_info.json` is the last. Between them whole
shards appear, under names that identify their records: what was interrupted continues with the missing ones.
"""

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from jaxtyping import Float16, Int
from ml_collections import ConfigDict

from offsetjax.data.shards import INFO, SIZES_FILE, shard_paths, write_info, write_shard
from offsetjax.errors import UserError
from offsetjax.files import unfinished, write_whole
from offsetjax.json_text import parse_object

SHARD_SIZE = 1024  # pictures: 100 to 500 MB, and as much encoding as an interruption can cost a process
_NAME, _VERSION = "latents", "1.0.0"
DESCRIPTION = f"{_NAME}.json"
_OPTIONS = "group_size:1,uncompressed"  # each record is found at once, and latents do not compress


@dataclass(frozen=True)
class Cache:
    """What a cache was made of, as `latents.json` says it.

    Attributes:
        encoder: the checksum of the autoencoder's weights that latents depend on.
        scaling_factor: that the autoencoder had; latents are kept without it.
        latent_mean, latent_std: of each channel, where the autoencoder was standardised on the data; else empty.
        latent_shape: channels, height and width; of several sizes the channels alone.
        resolution: of the cropped pictures; of several sizes, that of which they were chosen.
        random_flip: whether mirror images are there.
        source: the data set of the pictures.
        num_examples, num_bytes: of its splits, by their names.
        sizes: of the cropped pictures, as `data.buckets` has them, where they are several.
        max_aspect, max_enlargement: of those that were left out of them.
    """

    encoder: str
    scaling_factor: float
    latent_mean: Sequence[float]
    latent_std: Sequence[float]
    latent_shape: Sequence[int]
    resolution: int
    random_flip: bool
    source: str
    num_examples: Mapping[str, int]
    num_bytes: Mapping[str, int]
    sizes: Sequence[str] = ()
    max_aspect: float = 0.0
    max_enlargement: float = 0.0

    def to_json(self) -> str:
        """The text of `latents.json`."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def difference(self, other: "Cache") -> str | None:
        """The first field in which two caches differ; it does not matter where their pictures lie."""
        one, another = (parse_object(each.to_json()) for each in (self, other))
        return next((name for name in one if name != "source" and one[name] != another[name]), None)

    def features(self) -> tfds.features.FeaturesDict:
        """What a record holds."""
        shape: tuple[int | None, ...] = (1 + self.random_flip, 2, *self.latent_shape)
        # Without tensorflow TFDS reads arrays of which one length is not known, no more.
        several = {"latent_size": tfds.features.Tensor(shape=(2,), dtype=np.int32)} if self.sizes else {}
        shape += (None,) if self.sizes else ()
        return tfds.features.FeaturesDict(
            {
                "moments": tfds.features.Tensor(shape=shape, dtype=np.float16, encoding=tfds.features.Encoding.BYTES),
                "time_ids": tfds.features.Tensor(shape=(6,), dtype=np.float32),
                "brightness": np.float32,
                "caption": tfds.features.Text(),
                "name": tfds.features.Text(),
                **several,
            }
        )

    def fields(self, moments: Float16[np.ndarray, "v 2 c h w"] | None) -> dict[str, np.ndarray]:
        """The fields of a record that have its latents; of several sizes there may be none."""
        if not self.sizes:
            assert moments is not None
            return {"moments": moments}
        if moments is None:
            moments = np.zeros((1 + self.random_flip, 2, *self.latent_shape, 0, 0), np.float16)
        size = np.array(moments.shape[3:], np.int32)
        return {"moments": moments.reshape(*moments.shape[:3], -1), "latent_size": size}

    def moments(self, row: Mapping[str, Any]) -> Float16[np.ndarray, "v 2 c h w"]:
        """The latents of a record."""
        found = row["moments"]
        return found.reshape(*found.shape[:3], *row["latent_size"].tolist()) if self.sizes else found

    def check(self, path: str, data: ConfigDict, encoder: str, sizes: Sequence[str] = ()) -> None:
        """Compares it with a training.

        Args:
            path: of the cache, for the message.
            data: the section of the training's config.
            encoder: the checksum of its autoencoder's weights.
            sizes: of its pictures, where they are several.

        Raises:
            UserError: the training's latents would be others.
        """
        again = "or encode the pictures again with `offsetjax data encode`"
        if data.resolution != self.resolution:
            raise UserError(
                f"data: {path} has latents of pictures of {self.resolution} px, but data.resolution = "
                f"{data.resolution}; set it to {self.resolution}, {again}"
            )
        self._check_sizes(path, data, sizes, again)
        if data.random_flip and not self.random_flip:
            raise UserError(f"data: {path} has no mirror images; set data.random_flip=False, {again}")
        if encoder != self.encoder:
            raise UserError(
                f"data: {path} has latents of another autoencoder, with the checksum {self.encoder}; that of the "
                f"config has {encoder}: give the model that the pictures were encoded with, {again}"
            )

    def _check_sizes(self, path: str, data: ConfigDict, sizes: Sequence[str], again: str) -> None:
        if set(self.sizes) != set(sizes):
            given = f", but the config gives {', '.join(sizes)}" if sizes else ""
            raise UserError(
                f"data: {path} has latents of the sizes {', '.join(self.sizes)}{given}; set "
                f"data.buckets={tuple(self.sizes)!r}, {again}"
            )
        for name in ("max_aspect", "max_enlargement") if self.sizes else ():
            if data[name] != (of_cache := getattr(self, name)):
                raise UserError(
                    f"data: {path} was encoded with data.{name} = {of_cache:g}, but the config has {data[name]:g}; set "
                    f"it back, {again}"
                )

    def statistics(self, path: str, scale: str) -> tuple[np.ndarray, np.ndarray]:
        """The mean and the deviation of each channel, by which its autoencoder was standardised.

        Args:
            path: of the cache, for messages.
            scale: the config's field of the latents' scale.

        Raises:
            UserError: it was not.
        """
        if not self.latent_mean:
            raise UserError(
                f"data: {path} has latents that are not standardised, as {scale} = 0 asks for; set it "
                f"to {self.scaling_factor}, or encode the pictures again with `offsetjax data encode`"
            )
        return np.array(self.latent_mean, np.float32), np.array(self.latent_std, np.float32)


def read_cache(folder: epath.Path) -> Cache | None:
    """What the cache in a version folder was made of; None for other data sets.

    Raises:
        UserError: its `latents.json` is damaged.
    """
    file = folder / DESCRIPTION
    if not file.exists():
        return None
    try:
        return Cache(**parse_object(file.read_bytes()))
    except (ValueError, TypeError) as error:
        raise UserError(f"data: {file} is damaged; restore it from a copy, or encode the pictures again") from error


@dataclass(frozen=True)
class Shard:
    """One file of a cache, and the numbers of its first record and of the one after its last in their split."""

    path: epath.Path
    split: str
    first: int
    last: int

    def write(self, records: Iterable[Mapping[str, Any]], cache: Cache) -> None:
        """Writes its records; the file is there once it is whole."""
        write_shard(self.path, cache.features(), records, _OPTIONS)


def is_finished(out: epath.PathLike, cache: Cache) -> bool:
    """Whether a folder has the whole of a cache; if not, it can be begun there, or continued.

    Raises:
        UserError: something else is there.
    """
    out, folder = epath.Path(out), _folder(out)
    finished, there = (folder / INFO).exists(), read_cache(folder)
    if there is None:
        if not _is_free(out):
            raise UserError(f"data: {out} already exists; give another folder for the cache")
    elif field := cache.difference(there):
        raise UserError(
            f"data: {out} has {'a finished' if finished else 'an unfinished'} cache with {field} = "
            f"{getattr(there, field)}, but the config and its data now give {getattr(cache, field)}; give "
            "another folder"
        )
    return finished


def begin(out: epath.PathLike, cache: Cache, sizes: Mapping[str, Int[np.ndarray, "n 2"]] | None = None) -> None:
    """Writes what a cache is made of, before any of its shards, where it is not there yet.

    Args:
        sizes: of the whole pictures of each split, where they are of several.
    """
    if not is_begun(out):
        if sizes:
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **{split: each.astype(np.int32) for split, each in sizes.items()})  # type: ignore[arg-type]
            write_whole(_folder(out) / SIZES_FILE, buffer.getvalue())
        write_whole(_folder(out) / DESCRIPTION, cache.to_json())


def is_begun(out: epath.PathLike) -> bool:
    """Whether `begin` has been there."""
    return (_folder(out) / DESCRIPTION).exists()


def missing_shards(out: epath.PathLike, cache: Cache, shard_size: int) -> list[Shard]:
    """The shards that are not written yet."""
    folder = _folder(out)
    written = {path.name for path in folder.iterdir()} if folder.exists() else set()  # a bucket is slow to ask for each
    shards = (shard for split in cache.num_examples for shard in _shards(out, cache, split, shard_size))
    return [shard for shard in shards if shard.path.name not in written]


def finish(out: epath.PathLike, cache: Cache, shard_size: int) -> None:
    """Writes TFDS's metadata, with which the cache is one."""
    lengths = {
        split: [shard.last - shard.first for shard in _shards(out, cache, split, shard_size)]
        for split in cache.num_examples
    }
    description = "Latents of pictures, encoded by offsetjax."
    write_info(_folder(out), _NAME, _VERSION, description, cache.features(), lengths)


def _folder(out: epath.PathLike) -> epath.Path:
    return epath.Path(out) / _NAME / _VERSION


def _is_free(out: epath.Path) -> bool:
    """Whether nothing is there, or only what `begin` leaves when it is interrupted."""
    first = (DESCRIPTION, SIZES_FILE)
    beginnings = {SIZES_FILE, *(unfinished(_folder(out) / name).name for name in first)}
    place = out
    for names in ({_NAME}, {_VERSION}, beginnings):
        if not place.exists():
            return True
        if not place.is_dir() or any(entry.name not in names for entry in place.iterdir()):
            return False
        place = place / next(iter(names))
    return True


def _shards(out: epath.PathLike, cache: Cache, split: str, shard_size: int) -> Iterator[Shard]:
    total = cache.num_examples[split]
    firsts = range(0, total, shard_size)
    paths = shard_paths(_folder(out), _NAME, split, len(firsts))
    for first, path in zip(firsts, paths, strict=True):
        yield Shard(path, split, first, min(first + shard_size, total))
