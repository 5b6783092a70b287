"""A cache of latents as a source."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from offsetjax.data.buckets import Size
from offsetjax.data.cache import Cache, read_cache
from offsetjax.data.features import text
from offsetjax.data.record import Latents
from offsetjax.data.shards import SIZES_FILE
from offsetjax.data.source import Source, split_names
from offsetjax.data.tfds import Rows, noted_sizes, open_rows, version_folder
from offsetjax.errors import UserError


@dataclass(frozen=True)
class CachedLatents:
    """What `offsetjax data encode` wrote of one split; `cache` says what it was made of."""

    rows: Rows
    cache: Cache

    @property
    def label(self) -> str:
        return self.rows.label

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Latents:
        row = self.rows[index]
        about, time_ids = (text(row["caption"]), text(row["name"])), row["time_ids"]
        size = Size(int(time_ids[5]), int(time_ids[4])) if self.cache.sizes else None
        return Latents(self.cache.moments(row), time_ids, float(row["brightness"]), *about, size)

    def sizes(self) -> Int[np.ndarray, "n 2"]:
        """Width and height of each whole picture, 0 of one that could not be read.

        Raises:
            UserError: they are latents of squares, or the note of the sizes is damaged or gone.
        """
        if not self.cache.sizes:
            raise UserError(
                f"data: {self.label} has latents of squares of {self.cache.resolution} px; leave out data.buckets and "
                "data.bucket_count, or encode the pictures again with `offsetjax data encode`"
            )
        if (sizes := noted_sizes(self.rows)) is None:
            raise UserError(
                f"data: {self.label} has no {SIZES_FILE}; restore it from a copy, or encode the pictures again"
            )
        return sizes

    def fingerprint(self) -> dict[str, Any]:
        """With what distinguishes these latents from others, as the files of caches are as large whatever they show."""
        names = split_names(self.rows.split)  # a cache may have more splits, which are not read
        num_bytes = {name: count for name, count in self.cache.num_bytes.items() if names & {name, "all"}}
        return {**self.rows.fingerprint(), "encoder": self.cache.encoder, "bytes_of_pictures": num_bytes}

    def shares_records(self, other: Source) -> bool:
        return isinstance(other, CachedLatents) and self.rows.overlaps(other.rows)


def open_latents(path: str, split: str = "train") -> CachedLatents:
    """Opens a cache of latents.

    Args:
        split: one of the pictures' data set, by TFDS's rules.

    Raises:
        UserError: no cache, a damaged one, an unknown or empty split, or one that is cut by shards.
    """
    folder = version_folder(path)
    cache = read_cache(folder)
    if not cache:
        raise UserError(
            f"data: {folder} has pictures, not their latents; encode them with `offsetjax data encode`, or set "
            "data.cached_latents=False"
        )
    if re.search(r"\[[^]]*shard", split):
        raise UserError(
            f"data: the split {split!r} is cut by shards, which have other records in {folder} than in its pictures' "
            "data set; cut it by percents or numbers, such as 'train[:90%]'"
        )
    return CachedLatents(open_rows(folder, split, {"moments": "moments", "caption": "text"}), cache)
