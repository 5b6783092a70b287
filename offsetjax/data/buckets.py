r"""Aspect-ratio buckets: the few sizes to which pictures of every shape are scaled and cropped.

A picture of width w and height h goes to the size whose aspect (width / height) is nearest to its own on a logarithmic
scale; it is scaled until it covers that size, and what stands over is cropped:

    loss = 1 - min(a / b, b / a)        a the picture's aspect, b that of the size: the share of it that is cropped

All sizes have about the same area, for a batch of each takes about the same time. On a TPU every size is a program of
its own, so that a few sizes, chosen for the data, are better than the many of a fixed list: `chosen_sizes` finds those
that lose the fewest pixels, exactly, by dynamic programming over the candidates in the order of their aspects.

Source of the buckets: NovelAI, "Improvements on Stable Diffusion", 2022.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from offsetjax.errors import UserError


class Size(NamedTuple):
    """Width and height, in pixels, as users write them: 1152x896."""

    width: int
    height: int

    @property
    def aspect(self) -> float:
        """Width over height."""
        return self.width / self.height

    @property
    def pixels(self) -> int:
        """The area."""
        return self.width * self.height

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def square(resolution: int) -> Size:
    """The size of `resolution` pixels on each side."""
    return Size(resolution, resolution)


@dataclass(frozen=True)
class Limits:
    """Which pictures are taken.

    Attributes:
        max_aspect: the longer side over the shorter one, at most.
        max_enlargement: what a picture may be scaled up by; one that would need more is too small.
    """

    max_aspect: float = 3.0
    max_enlargement: float = float("inf")


@dataclass(frozen=True)
class Assignment:
    """What becomes of each picture.

    Attributes:
        sizes: in the order of their aspects, and then of their areas.
        bucket: the place of its size for each picture, and -1 for one that is dropped.
        is_extreme: dropped for its aspect.
        is_small: dropped for its size.
        is_unreadable: dropped, for its size is not known.
        loss: the share of each picture that is cropped; 0 for one that is dropped.
    """

    sizes: tuple[Size, ...]
    bucket: Int[np.ndarray, " n"]
    is_extreme: Bool[np.ndarray, " n"]
    is_small: Bool[np.ndarray, " n"]
    is_unreadable: Bool[np.ndarray, " n"]
    loss: Float[np.ndarray, " n"]

    @property
    def counts(self) -> Int[np.ndarray, " k"]:
        """How many pictures each size has."""
        return np.array([np.count_nonzero(self.bucket == place) for place in range(len(self.sizes))])

    def size_of(self, picture: int) -> Size | None:
        """The size of a picture, by its number; None of one that is dropped."""
        place = int(self.bucket[picture])
        return self.sizes[place] if place >= 0 else None

    @property
    def losses(self) -> Float[np.ndarray, " k"]:
        """The mean share of a picture of each size that is cropped; 0 where there is none."""
        lost = [self.loss[self.bucket == place].sum(dtype=np.float64) for place in range(len(self.sizes))]
        return np.array(lost) / np.maximum(self.counts, 1)


def parse_size(text: str, field: str = "data.buckets") -> Size:
    """`"1152x896"` → its width and height.

    Args:
        field: of the config, for the message.

    Raises:
        UserError: it is none.
    """
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise UserError(f"config: {field}: {text!r} is no size; write width and height, such as 1152x896")
    return Size(int(width), int(height))


def check_sizes(sizes: Sequence[Size], unit: int, field: str = "data.buckets") -> None:
    """Refuses sizes that the networks cannot take, and sizes that are given twice.

    Args:
        unit: pixels that each side must be a multiple of, by which the networks halve it.
        field: of the config, for the message.

    Raises:
        UserError: with the nearest size that they can take.
    """
    for size in sizes:
        if size.width % unit or size.height % unit:
            near = Size(*(max(unit, round(side / unit) * unit) for side in size))
            raise UserError(f"config: {field}: {size} must be multiples of {unit}, such as {near}")
    twice = sorted({str(size) for size in sizes if list(sizes).count(size) > 1})
    if twice:
        raise UserError(f"config: {field}: {', '.join(twice)} is given twice")


def candidate_sizes(area: int, step: int, max_aspect: float) -> tuple[Size, ...]:
    """Every size in steps of `step` pixels of near-equal area, by aspect, the narrowest first.

    For each width the greatest height with `width x height <= area`, and the same with the two exchanged, so that a
    size and its counterpart on the other side of the square are both there.

    Args:
        area: in pixels.
        step: of each side, in pixels.
        max_aspect: the longer side over the shorter one, at most.

    Raises:
        UserError: the area is too small for the step.
    """
    if area < step * step:
        raise UserError(f"config: data.bucket_step = {step} is too much for pictures of {area} pixels; take less")
    sizes: set[Size] = set()
    short = step
    while short * short <= area:
        long = area // short // step * step
        if long / short <= max_aspect:
            sizes |= {Size(short, long), Size(long, short)}
        short += step
    side = int(np.sqrt(area)) // step * step
    return tuple(sorted(sizes | {Size(side, side)}, key=lambda size: (size.aspect, size.pixels)))


def chosen_sizes(
    aspects: Float[np.ndarray, " n"],
    candidates: Sequence[Size],
    count: int,
    weights: Float[np.ndarray, " n"] | None = None,
) -> tuple[Size, ...]:
    """The `count` candidates that lose the fewest pixels of these pictures to cropping; fewer where fewer lose none.

    Exact: the best choice that ends with candidate j, of k sizes, extends the best one that ends with an earlier
    candidate i, of k - 1; the pictures between the aspects of i and j go to the one that crops less of them, on either
    side of √(bᵢ bⱼ). Of choices that lose the same, the one of fewer sizes is taken.

    Args:
        aspects: width over height of each picture.
        candidates: of different aspects, such as `candidate_sizes` gives.
        count: sizes at most.
        weights: of the pictures, such as how often each is repeated.
    """
    order = np.argsort(aspects, kind="stable")
    sorted_aspects = np.asarray(aspects, np.float64)[order]
    weight = np.ones(len(order)) if weights is None else np.asarray(weights, np.float64)[order]
    places = np.array([size.aspect for size in candidates])
    sums = [
        np.concatenate([[0.0], np.cumsum(each)]) for each in (weight, weight * sorted_aspects, weight / sorted_aspects)
    ]

    def narrower(begin: Int[np.ndarray, "..."], end: Int[np.ndarray, "..."], place: np.ndarray) -> np.ndarray:
        """What pictures [begin, end), narrower than the size, lose: Σ w (1 - a / b)."""
        return sums[0][end] - sums[0][begin] - (sums[1][end] - sums[1][begin]) / place

    def wider(begin: Int[np.ndarray, "..."], end: Int[np.ndarray, "..."], place: np.ndarray) -> np.ndarray:
        """What pictures [begin, end), wider than the size, lose: Σ w (1 - b / a)."""
        return sums[0][end] - sums[0][begin] - (sums[2][end] - sums[2][begin]) * place

    at = np.searchsorted(sorted_aspects, places)
    between = np.searchsorted(sorted_aspects, np.sqrt(places[:, None] * places[None, :]))
    i, j = places[:, None], places[None, :]
    cost = wider(at[:, None], between, i) + narrower(between, at[None, :], j)
    cost = np.where(np.arange(len(places))[:, None] < np.arange(len(places))[None, :], cost, np.inf)
    first = narrower(np.zeros_like(at), at, places)
    last = wider(at, np.full_like(at, len(order)), places)

    totals, came_from = [first], []
    for _ in range(1, min(count, len(places))):
        through = totals[-1][:, None] + cost
        came_from.append(through.argmin(0))
        totals.append(through.min(0))
    ends = [float((total + last).min()) for total in totals]
    best = min(range(len(ends)), key=lambda k: (round(ends[k], 9), k))
    place = int((totals[best] + last).argmin())
    chosen = [place]
    for came in reversed(came_from[:best]):
        place = int(came[place])
        chosen.append(place)
    return tuple(candidates[place] for place in reversed(chosen))


_CHUNK = 2**16  # pictures that are looked at together: what is held of them for each size is small


def assign(
    widths: Int[np.ndarray, " n"], heights: Int[np.ndarray, " n"], sizes: Sequence[Size], limits: Limits = Limits()
) -> Assignment:
    """Each picture's size: one that it has already, else the one that crops the least, else the larger area.

    A picture that would be enlarged by more than the limits allow falls into the largest size, of those that crop the
    least of it, for which it is large enough; where there is none, it is dropped. Widths and heights are compared as
    whole numbers, as shown (after EXIF's rotation); where one is 0 the picture's size is not known.

    Memory: 8 bytes a picture, and a little that does not grow with their number.
    """
    ordered = tuple(sorted(sizes, key=lambda size: (size.aspect, size.pixels)))
    count = len(widths)
    dtype = np.int8 if len(ordered) <= np.iinfo(np.int8).max else np.int16
    bucket, lost = np.empty(count, dtype), np.empty(count, np.float32)
    is_extreme, is_small, is_unreadable = (np.empty(count, bool) for _ in range(3))
    for begin in range(0, count, _CHUNK):
        part = slice(begin, begin + _CHUNK)
        bucket[part], is_extreme[part], is_small[part], is_unreadable[part], lost[part] = _assigned(
            np.asarray(widths[part], np.int64), np.asarray(heights[part], np.int64), ordered, limits
        )
    return Assignment(ordered, bucket, is_extreme, is_small, is_unreadable, lost)


def _assigned(
    widths: Int[np.ndarray, " n"], heights: Int[np.ndarray, " n"], ordered: Sequence[Size], limits: Limits
) -> tuple[np.ndarray, ...]:
    """Of a few pictures: bucket, is_extreme, is_small, is_unreadable and loss."""
    is_unreadable = (widths < 1) | (heights < 1)
    width, height = np.maximum(widths, 1)[:, None], np.maximum(heights, 1)[:, None]
    wide, high = (np.array([size[axis] for size in ordered], np.int64)[None, :] for axis in (0, 1))
    # a / b, as a ratio of whole numbers: equal aspects lose exactly nothing.
    left, right = width * high, height * wide
    loss = 1.0 - np.minimum(left, right) / np.maximum(left, right)
    is_allowed = np.maximum(wide / width, high / height) <= limits.max_enlargement
    is_extreme = (np.maximum(width, height) > limits.max_aspect * np.minimum(width, height))[:, 0] & ~is_unreadable
    is_small = ~is_allowed.any(1) & ~is_extreme & ~is_unreadable
    is_same = (width == wide) & (height == high)
    # By loss, then by area; a picture that has a size of the list stays as it is.
    rank = np.where(is_same, -1.0, loss) - 1e-12 * (wide * high) / (wide * high).max()
    bucket = np.where(is_allowed, rank, np.inf).argmin(1)
    is_dropped = is_extreme | is_small | is_unreadable
    lost = np.where(is_dropped, 0.0, np.take_along_axis(loss, bucket[:, None], 1)[:, 0])
    return np.where(is_dropped, -1, bucket), is_extreme, is_small, is_unreadable, lost
