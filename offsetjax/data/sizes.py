"""The sizes that a training's pictures are brought to: one square for all, or a few of different shapes."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from offsetjax.data.batches import BatchPlan
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
from offsetjax.data.source import Source, unreadable
from offsetjax.errors import UserError
from offsetjax.progress import tracked

_log = logging.getLogger("offsetjax")


@dataclass(frozen=True)
class Buckets:
    """Pictures by size, and the batches that are made of them.

    Attributes:
        assignment: what becomes of each picture of the source.
        plan: which examples each batch holds; its groups are in the order of `assignment.sizes`.
    """

    assignment: Assignment
    plan: BatchPlan

    @property
    def sizes(self) -> tuple[Size, ...]:
        """All sizes, by their places."""
        return self.assignment.sizes

    def fingerprint(self) -> dict[str, Any]:
        """What decides on the batches beside the seed: the sizes, and which pictures each has."""
        digest = hashlib.sha256(self.assignment.bucket.astype("<i8").tobytes()).hexdigest()
        return {"sizes": [str(size) for size in self.sizes], "pictures_of_sizes": digest}

    def describe(self) -> Iterator[str]:
        """A line for each size, and one for what is dropped and cropped."""
        counts, total = self.assignment.counts, len(self.assignment.bucket)
        for size, count, batch in zip(self.sizes, counts.tolist(), self.plan.batch_sizes, strict=True):
            yield f"{size}: {count:,} pictures, {count / batch:,.1f} batches an epoch"
        kept = self.assignment.bucket >= 0
        lost = float(self.assignment.loss[kept].mean())
        extreme, small = int(self.assignment.is_extreme.sum()), int(self.assignment.is_small.sum())
        yield (
            f"{int(kept.sum()):,} of {total:,} pictures, {lost:.1%} of their pixels cropped; left out: {extreme:,} for "
            f"their shape, {small:,} for their size"
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
) -> Buckets:
    """The sizes of a training, which pictures each has, and its batches.

    Args:
        given: sizes such as "1152x896"; empty: `count` of them are chosen for the pictures.
        resolution: the side of a square of the area that chosen sizes have, in pixels.
        step: of the sides of chosen sizes, in pixels.
        unit: what all sides must be a multiple of.
        batch_size: examples a batch, over all processes.
        seed: of the order.

    Raises:
        UserError: sizes that the networks cannot take, no picture that fits any, or a source without sizes.
    """
    taken = tuple(parse_size(text) for text in given)
    check_sizes(taken, unit)
    if not given and step % unit:
        raise UserError(f"config: data.bucket_step = {step} must be a multiple of {unit}, by which networks halve it")
    sizes = measured(source)  # of data without a note, minutes
    if not given:
        taken = _chosen(sizes, count, resolution, step, limits)
    assignment = assign(sizes[:, 0], sizes[:, 1], taken, limits)
    groups = tuple(np.flatnonzero(assignment.bucket == place) for place in range(len(taken)))
    if given and (empty := [str(size) for size, group in zip(assignment.sizes, groups, strict=True) if not len(group)]):
        raise UserError(
            f"data: no picture of {source.label} goes to {', '.join(empty)} of data.buckets, which would never make a "
            "batch; leave it out"
        )
    return Buckets(assignment, BatchPlan(groups, (batch_size,) * len(groups), seed))


def _chosen(sizes: Int[np.ndarray, "n 2"], count: int, resolution: int, step: int, limits: Limits) -> tuple[Size, ...]:
    aspects = sizes[:, 0] / sizes[:, 1]
    aspects = aspects[np.maximum(aspects, 1 / aspects) <= limits.max_aspect]
    if not len(aspects):
        raise UserError(f"data: every picture is longer than data.max_aspect = {limits.max_aspect:g} allows; raise it")
    chosen = chosen_sizes(aspects, candidate_sizes(resolution**2, step, limits.max_aspect), count)
    # One that no picture is nearest to would be compiled for nothing.
    used = np.unique(assign(sizes[:, 0], sizes[:, 1], chosen, limits).bucket)
    return tuple(size for place, size in enumerate(chosen) if place in used) or chosen  # of none, the plan says so


def cropped_by_count(sizes: Int[np.ndarray, "n 2"], counts: Sequence[int], resolution: int, step: int) -> list[float]:
    """The share of all pixels that is cropped with so many sizes chosen for the pictures; of one, squares.

    Pictures that `Limits` would leave out are left out.
    """
    aspects = sizes[:, 0] / sizes[:, 1]
    is_kept = np.maximum(aspects, 1 / aspects) <= Limits().max_aspect
    if not is_kept.any():
        return [0.0] * len(counts)
    candidates = candidate_sizes(resolution**2, step, Limits().max_aspect)
    lost = []
    for count in counts:
        chosen = (square(resolution),) if count == 1 else chosen_sizes(aspects[is_kept], candidates, count)
        lost.append(float(assign(sizes[is_kept, 0], sizes[is_kept, 1], chosen).loss.mean()))
    return lost


def measured(source: Source) -> Int[np.ndarray, "n 2"]:
    """Width and height of each picture of a source, in pixels: its own `sizes()`, or else from each of its records.

    Raises:
        UserError: the source's records have no sizes, or one cannot be read.
    """
    own = getattr(source, "sizes", None)
    return own() if own else sizes_of(source)


def sizes_of(source: Source) -> Int[np.ndarray, "n 2"]:
    """The same, from each record's `size()`.

    Raises:
        UserError: as for `measured`.
    """
    if not hasattr(source[0], "size"):
        raise UserError(f"data: {source.label} does not say how large its pictures are, which data.buckets needs")

    def size(index: int) -> Size:
        try:
            return source[index].size()  # type: ignore[attr-defined]
        except UnreadableImage as error:
            raise unreadable(source, index, error) from error

    with ThreadPoolExecutor() as pool:
        found = tracked(pool.map(size, range(len(source))), "Reading the sizes of pictures", len(source))
        return np.array(list(found), np.int64).reshape(-1, 2)
