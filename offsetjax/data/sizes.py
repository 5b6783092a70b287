"""The sizes that a training's pictures are brought to: one square for all, or a few of different shapes."""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from offsetjax.data.batches import BatchPlan, EachOnce, Plan
from offsetjax.data.buckets import (
    Assignment,
    Limits,
    Size,
    assign,
    candidate_sizes,
    check_sizes,
    chosen_sizes,
    parse_size,
    square,
)
from offsetjax.data.images import UnreadableImage
from offsetjax.data.mixed import Mixed
from offsetjax.data.source import Source, unreadable
from offsetjax.errors import UserError
from offsetjax.progress import tracked

_log = logging.getLogger("offsetjax")
_CHUNK = 2**20  # pictures, of many millions, that are looked at together
_NAMED = 8  # of the pictures that cannot be read
_NEAR = 1.15  # sides of squares that differ by less are the same: sizes are rounded to steps


@dataclass(frozen=True)
class Buckets:
    """Pictures by size, and the batches that are made of them.

    Attributes:
        assignment: what becomes of each picture of the source.
        plan: which examples each batch holds; its groups are in the order of `assignment.sizes`.
        notes: what a user should know of them.
    """

    assignment: Assignment
    plan: Plan
    notes: tuple[str, ...] = ()

    @property
    def sizes(self) -> tuple[Size, ...]:
        """All sizes, by their places."""
        return self.assignment.sizes

    @property
    def batch_sizes(self) -> dict[Size, int]:
        """How many examples a batch of each size has."""
        return dict(zip(self.sizes, self.plan.batch_sizes, strict=True))

    @property
    def batches_an_epoch(self) -> float:
        """Over all sizes, in the mean."""
        return float((self.assignment.counts / np.asarray(self.plan.batch_sizes)).sum())

    def fingerprint(self) -> dict[str, Any]:
        """What decides on the batches beside the seed: the sizes, and which pictures each has."""
        digest = hashlib.sha256()
        for begin in range(0, len(self.assignment.bucket), _CHUNK):
            digest.update(self.assignment.bucket[begin : begin + _CHUNK].astype("<i8").tobytes())
        return {
            "sizes": [str(size) for size in self.sizes],
            "pictures_of_sizes": digest.hexdigest(),
            "batch_sizes": list(self.plan.batch_sizes),
        }

    def describe(self) -> Iterator[str]:
        """A line for each size, and one for what is dropped and cropped."""
        found = self.assignment
        counts, total = found.counts, len(found.bucket)
        for size, count, lost, batch in zip(
            self.sizes, counts.tolist(), found.losses.tolist(), self.plan.batch_sizes, strict=True
        ):
            few = ", less than one of each" * (0 < count < batch)
            yield f"{size}: {count:,} pictures, {lost:.1%} cropped, {count / batch:,.1f} batches of {batch}{few}"
        extreme, small, unread = (int(each.sum()) for each in (found.is_extreme, found.is_small, found.is_unreadable))
        unreadable = f", {unread:,} that cannot be read" * (unread > 0)
        yield (
            f"{counts.sum():,} of {total:,} pictures, {cropped(found):.1%} of their pixels cropped, "
            f"{self.batches_an_epoch:,.1f} batches an epoch; left out: {extreme:,} for their shape, {small:,} for "
            f"their size{unreadable}"
        )


def make_buckets(
    source: Source,
    *,
    given: Sequence[str],
    count: int,
    resolution: int,
    step: int,
    unit: int,
    limits: Limits,
    batch_size: int,
    seed: int,
    max_bad_fraction: float = 0.0,
    equal_tokens: int = 0,
) -> Buckets:
    """The sizes of a training, which pictures each has, and its batches.

    Args:
        given: sizes such as "1152x896"; empty: `count` of them are chosen for the pictures.
        resolution: the side of a square of the area that chosen sizes have, in pixels.
        step: of the sides of chosen sizes, in pixels.
        unit: what all sides must be a multiple of.
        batch_size: examples a batch, over all processes.
        seed: of the order.
        max_bad_fraction: of the pictures, those that may be left out where their sizes cannot be read.
        equal_tokens: 0, or what the batches of all sizes are a multiple of, as many as have together as many pixels as
            `batch_size` squares of `resolution`.

    Raises:
        UserError: sizes that the networks cannot take, no picture that fits any, or a source without sizes.
    """
    taken = tuple(parse_size(text) for text in given)
    check_sizes(taken, unit)
    if not given and step % unit:
        raise UserError(f"config: data.bucket_step = {step} must be a multiple of {unit}, by which networks halve it")
    sizes = measured(source)  # of data without a note, minutes
    notes = list(_unreadable(source, sizes, max_bad_fraction))
    if not given:
        taken = _chosen(sizes, count, resolution, step, limits)
    assignment = assign(sizes[:, 0], sizes[:, 1], taken, limits)
    groups = tuple(np.flatnonzero(assignment.bucket == place).astype(np.int32) for place in range(len(taken)))
    if given and (empty := [str(size) for size, group in zip(assignment.sizes, groups, strict=True) if not len(group)]):
        raise UserError(
            f"data: no picture of {source.label} goes to {', '.join(empty)} of data.buckets, which would never make a "
            "batch; leave it out"
        )
    notes += () if equal_tokens else _other_area(assignment, resolution)
    batch_sizes = tuple(batch_size_of(size, batch_size, resolution, equal_tokens) for size in assignment.sizes)
    return Buckets(assignment, BatchPlan(groups, batch_sizes, seed), tuple(notes))


def batch_size_of(size: Size, batch_size: int, resolution: int, equal_tokens: int) -> int:
    """The examples of a batch of a size; see `make_buckets`."""
    if not equal_tokens:
        return batch_size
    return max(1, round(batch_size * resolution**2 / size.pixels / equal_tokens)) * equal_tokens


def once_each(
    source: Source, batch_sizes: Mapping[Size, int], limits: Limits, at_most: int
) -> tuple[Buckets, EachOnce]:
    """Batches that show up to `at_most` pictures of a source once, each at the one of these sizes that suits it.

    A batch of a size has as many examples as is said with it. Which pictures these are, where there are more, depends
    on nothing else.

    Raises:
        UserError: none fits any of the sizes.
    """
    found = measured(source)
    assignment = assign(found[:, 0], found[:, 1], tuple(batch_sizes), limits)
    fitting = np.flatnonzero(assignment.bucket >= 0)
    if not len(fitting):
        raise UserError(
            f"data: no picture of {source.label} fits any of the sizes {', '.join(map(str, batch_sizes))}; see "
            "data.max_aspect and data.max_enlargement"
        )
    taken = np.random.default_rng(0).permutation(fitting)[:at_most]
    groups = tuple(taken[assignment.bucket[taken] == place] for place in range(len(assignment.sizes)))
    plan = EachOnce(groups, tuple(batch_sizes[size] for size in assignment.sizes))
    return Buckets(assignment, plan, tuple(_unreadable(source, found, 1.0))), plan


def _unreadable(source: Source, sizes: Int[np.ndarray, "n 2"], max_bad_fraction: float) -> Iterator[str]:
    """Names pictures whose size is not known; refuses them where they are more than may be left out."""
    bad = np.flatnonzero(sizes[:, 0] == 0).tolist()
    if len(bad) > max_bad_fraction * len(sizes):
        others = f" (and {len(bad) - 1} more are like it)" * (len(bad) > 1)
        raise UserError(f"{_problem(source, bad[0])}{others}, or raise data.max_bad_fraction = {max_bad_fraction:g}")
    for index in bad[:_NAMED]:
        yield f"{_problem(source, index)}; it is left out"
    if len(bad) > _NAMED:
        yield f"data: {len(bad) - _NAMED} more pictures cannot be read, and are left out"


def _other_area(assignment: Assignment, resolution: int) -> Iterator[str]:
    """Where the sizes have another area than `data.resolution` says, by which noise is scaled and pictures drawn."""
    if not assignment.counts.sum():
        return
    pixels = np.array([size.pixels for size in assignment.sizes])
    side = float(np.sqrt(pixels @ assignment.counts / assignment.counts.sum()))
    if not _NEAR > side / resolution > 1 / _NEAR:
        yield (
            f"data: the sizes of data.buckets have the area of a square of {side:.0f} pixels, but data.resolution = "
            f"{resolution}, by which pictures are drawn and noise is described; set it to about {side:.0f}"
        )


def _problem(source: Source, index: int) -> UserError:
    """Why the size of a picture cannot be read."""
    try:
        source[index].size()  # type: ignore[attr-defined]
    except UnreadableImage as error:
        return unreadable(source, index, error)
    except UserError as error:
        return error
    return UserError(f"data: record {index} of {source.label} could not be read; try again")


def _chosen(sizes: Int[np.ndarray, "n 2"], count: int, resolution: int, step: int, limits: Limits) -> tuple[Size, ...]:
    distinct, times = _distinct(sizes)
    aspects = distinct[:, 0] / distinct[:, 1]
    is_taken = np.maximum(aspects, 1 / aspects) <= limits.max_aspect
    if not is_taken.any():
        raise UserError(f"data: every picture is longer than data.max_aspect = {limits.max_aspect:g} allows; raise it")
    candidates = candidate_sizes(resolution**2, step, limits.max_aspect)
    chosen = chosen_sizes(aspects[is_taken], candidates, count, times[is_taken])
    # One that no picture is nearest to would be compiled for nothing.
    used = np.unique(assign(distinct[:, 0], distinct[:, 1], chosen, limits).bucket)
    return tuple(size for place, size in enumerate(chosen) if place in used) or chosen  # of none, the plan says so


def _distinct(sizes: Int[np.ndarray, "n 2"]) -> tuple[Int[np.ndarray, "m 2"], Int[np.ndarray, " m"]]:
    """The sizes that there are, but for those that are not known, and how many pictures have each."""
    keys, times = np.empty(0, np.int64), np.empty(0, np.int64)
    for begin in range(0, len(sizes), _CHUNK):
        part = sizes[begin : begin + _CHUNK].astype(np.int64)
        part = part[part[:, 0] > 0]
        found, counts = np.unique(part[:, 0] << 32 | part[:, 1], return_counts=True)
        keys, places = np.unique(np.concatenate([keys, found]), return_inverse=True)
        times = np.bincount(places, np.concatenate([times, counts]), len(keys)).astype(np.int64)
    return np.stack([keys >> 32, keys & 0xFFFFFFFF], 1), times


def suited(sizes: Int[np.ndarray, "n 2"], counts: Sequence[int], resolution: int, step: int) -> list[Assignment]:
    """What becomes of pictures with so many sizes chosen for them; with one, squares.

    Pictures that `Limits` would leave out are left out.
    """
    aspects = sizes[:, 0] / sizes[:, 1]
    is_kept = np.maximum(aspects, 1 / aspects) <= Limits().max_aspect
    candidates = candidate_sizes(resolution**2, step, Limits().max_aspect)
    found = []
    for count in counts:
        is_square = count == 1 or not is_kept.any()
        chosen = (square(resolution),) if is_square else chosen_sizes(aspects[is_kept], candidates, count)
        found.append(assign(sizes[:, 0], sizes[:, 1], chosen))
    return found


def cropped(assignment: Assignment) -> float:
    """The share of the pixels of all pictures that have a size that is cropped."""
    return float(assignment.losses @ assignment.counts / max(1, assignment.counts.sum()))


def measured(source: Source) -> Int[np.ndarray, "n 2"]:
    """Width and height of each picture of a source, in pixels: its own `sizes()`, or else from each of its records.

    They are 0 for one that cannot be read. What was measured last is remembered: data without a note of its sizes takes
    minutes, and a start asks twice.

    Raises:
        UserError: the source's records have no sizes.
    """
    global _latest
    if _latest is None or _latest[0] is not source:
        _latest = source, _measured(source)
    return _latest[1]


def _measured(source: Source) -> Int[np.ndarray, "n 2"]:
    if isinstance(source, Mixed):
        each = zip(map(_measured, source.sources), source.counts, strict=True)
        return np.concatenate([np.resize(sizes, (count, 2)) for sizes, count in each])
    own = getattr(source, "sizes", None)
    return own() if own else sizes_of(source)


_latest: tuple[Source, Int[np.ndarray, "n 2"]] | None = None


def sizes_of(source: Source) -> Int[np.ndarray, "n 2"]:
    """The same, from each record's `size()`.

    Raises:
        UserError: as for `measured`.
    """

    def size(index: int) -> Size:
        try:
            record = source[index]
        except UserError:  # a damaged record
            return _UNKNOWN
        if not hasattr(record, "size"):
            raise UserError(f"data: {source.label} does not say how large its pictures are, which data.buckets needs")
        try:
            return record.size()
        except UnreadableImage:
            return _UNKNOWN

    found = np.empty((len(source), 2), np.int32)
    with ThreadPoolExecutor() as pool:
        begins = range(0, len(source), _AT_ONCE)
        for begin in tracked(begins, "Reading the sizes of pictures", len(begins)):
            end = min(begin + _AT_ONCE, len(source))
            found[begin:end] = list(pool.map(size, range(begin, end)))
    return found


_UNKNOWN = Size(0, 0)
_AT_ONCE = 256  # pictures that are asked for together
