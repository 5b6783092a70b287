"""One shard of a build: its items → records, and what became of each."""

import json
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from offsetjax.data.cleaning import Cleaning
from offsetjax.data.images import UnreadableImage, clean
from offsetjax.data.items import Dropped, Items, Named
from offsetjax.data.shards import write_shard
from offsetjax.files import write_whole
from offsetjax.json_text import parse_object

Given = TypeVar("Given")
Made = TypeVar("Made")
_OPTIONS = "group_size:1"  # each record is found at once


def features() -> tfds.features.FeaturesDict:
    """What a record holds; `captions` are those beyond the first."""
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "caption": tfds.features.Text(),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "name": tfds.features.Text(),
            "height": np.int32,
            "width": np.int32,
        }
    )


@dataclass(frozen=True)
class Result:
    """What became of a shard's items: how many are kept, and (name, reason) of the others with their places.

    Attributes:
        sizes: width and height of those that are kept, in pixels.
        known: name, place and digest of each, where duplicates are left out.
    """

    kept: int
    dropped: tuple[tuple[str, str], ...]
    places: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    known: tuple[tuple[str, int, str], ...] = ()


@dataclass(frozen=True)
class Task:
    """One shard to write, its items, and those of them that are left out: by their places, and why."""

    path: epath.Path
    split: str
    items: Items
    cleaning: Cleaning = field(default_factory=Cleaning)
    left_out: Mapping[int, str] = field(default_factory=dict)

    @property
    def result_path(self) -> epath.Path:
        return self.path.parent / f".{self.path.name}.json"

    @property
    def is_done(self) -> bool:
        """Whether the shard is there, with what this version says of its items; else it is written again."""
        try:
            self.result()
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return False
        return self.path.exists()

    def result(self) -> Result:
        """What became of its items, once it is done."""
        stored = parse_object(self.result_path.read_bytes())
        dropped = tuple((str(name), str(reason)) for name, reason in stored["dropped"])
        sizes = tuple((int(width), int(height)) for width, height in stored["sizes"])
        known = tuple((str(name), int(place), str(digest)) for name, place, digest in stored["known"])
        return Result(int(stored["kept"]), dropped, tuple(stored["places"]), sizes, known)

    def write(self, threads: int) -> int:
        """Writes the shard and what became of its items; how many there were."""
        dropped: list[tuple[str, str]] = []
        places: list[int] = []
        sizes: list[tuple[int, int]] = []
        known: list[tuple[str, int, str]] = []
        self.result_path.unlink(missing_ok=True)  # of a shard that is written again, it would tell of the one before

        def kept() -> Iterator[dict[str, Any]]:
            for place, (name, record, digest) in enumerate(_in_order(self._record, enumerate(self.items), threads)):
                if isinstance(record, Dropped):
                    dropped.append((name, str(record)))
                    places.append(place)
                else:
                    sizes.append((record["width"], record["height"]))
                    known.extend([(name, place, digest)] if digest else [])
                    yield record

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `clean` refuses what it warns of
            count = write_shard(self.path, features(), kept(), _OPTIONS)
        result = Result(count, tuple(dropped), tuple(places), tuple(sizes), tuple(known))
        write_whole(self.result_path, json.dumps(asdict(result)) + "\n")
        return len(self.items)

    def _record(self, numbered: tuple[int, Named]) -> tuple[str, dict[str, Any] | Dropped, str]:
        """The name of an item, its record or why there is none, and its digest."""
        place, named = numbered
        try:
            if place in self.left_out:
                raise Dropped(self.left_out[place])
            item = named.read()
            image, height, width = clean(item.image)
            self.cleaning.check_size(height, width)
            self.cleaning.check_file(item.image)
            digest = self.cleaning.digest(image)
        except Dropped as reason:
            return named.name, reason, ""
        except UnreadableImage as error:
            return named.name, Dropped(str(error)), ""
        first, *others = item.captions
        about = {"caption": first, "captions": others, "name": item.name}
        return named.name, {"image": image, "height": height, "width": width, **about}, digest


def _in_order(make: Callable[[Given], Made], items: Iterable[Given], threads: int) -> Iterator[Made]:
    """What threads make of items, in their order; few are held, however many there are."""
    waiting: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for each in items:
                waiting.append(pool.submit(make, each))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
