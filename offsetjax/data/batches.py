r"""Which examples each batch holds, where batches have different sizes: a pure function of (data, seed, number).

Each size s has n_s examples, B_s to a batch. Its examples come in an endless sequence, one permutation of all of them
after another; a batch takes the next B_s, over the end of a permutation where it must. So no example is left out, and
of each size no more than B_s - 1 examples wait at the end of an epoch for the first batch of the next.

An epoch E has, of each size,

    k_s(E) = ⌊(E + 1) n_s / B_s⌋ - ⌊E n_s / B_s⌋     batches

in an order that spreads them: batch i of k_s stands at the place (i + u) / k_s of the epoch, u uniform on [0, 1). A
size that has fewer examples than a batch gets one batch every few epochs, and a size of many no runs that chance would
not give.

The position is one integer, the number of the batch; every host computes the same plan without talking. A permutation
is a table where that is small, and for many examples a Feistel network, of which any place is computed by itself: what
a plan holds of hundreds of millions of examples are its groups.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Int

from offsetjax.errors import UserError


class Batch(NamedTuple):
    """One batch: the place of its size, and its examples."""

    size: int
    examples: Int[np.ndarray, " b"]


class Plan(Protocol):
    """Which examples each batch holds, by its number.

    Attributes:
        groups: the examples of each size, an array each.
        batch_sizes: examples a batch of each size, over all hosts.
    """

    @property
    def groups(self) -> tuple[Int[np.ndarray, " n"], ...]: ...

    @property
    def batch_sizes(self) -> tuple[int, ...]: ...

    def batch(self, number: int) -> Batch:
        """The batch of that number, from 0 on."""

    def size_of(self, number: int) -> int:
        """The place of a batch's size, without its examples."""

    def following(self, number: int, place: int, count: int) -> Batch:
        """So many examples of a batch's size from a place in it on, over its end too: what may stand in for others."""


@dataclass(frozen=True)
class BatchPlan:
    """Batches for ever, by their number.

    Attributes:
        groups: the examples of each size, an array each; one that stands there twice is seen twice an epoch.
        batch_sizes: examples a batch of each size, over all hosts.
        seed: of the order.
    """

    groups: tuple[Int[np.ndarray, " n"], ...]
    batch_sizes: tuple[int, ...]
    seed: int

    def __post_init__(self) -> None:
        if len(self.groups) != len(self.batch_sizes) or min(self.batch_sizes, default=0) < 1:
            raise ValueError("a batch size of at least 1 is needed for each size")
        if not any(len(group) for group in self.groups):
            raise UserError("data: no picture fits any of the sizes; see data.buckets and its limits")

    def batch(self, number: int) -> Batch:
        """The batch of that number, from 0 on."""
        size, begin = self._begin(number)
        return Batch(size, self._examples(size, begin, self.batch_sizes[size]))

    def following(self, number: int, place: int, count: int) -> Batch:
        """See `Plan.following`."""
        size, begin = self._begin(number)
        return Batch(size, self._examples(size, begin + place, count))

    def _begin(self, number: int) -> tuple[int, int]:
        """A batch's size, and its first place in the endless sequence of that size."""
        epoch = self.epoch_of(number)
        size, before = self._place(epoch, number)
        count = self.batch_sizes[size]
        return size, (epoch * len(self.groups[size]) // count + before) * count

    def _examples(self, size: int, begin: int, count: int) -> Int[np.ndarray, " b"]:
        group = self.groups[size]
        cycles, places = np.divmod(np.arange(begin, begin + count), len(group))
        examples = np.empty(count, np.int64)
        for cycle in np.unique(cycles):
            mine = cycles == cycle
            examples[mine] = group[permuted(self.seed, size, int(cycle), len(group), places[mine])]
        return examples

    def size_of(self, number: int) -> int:
        """See `Plan.size_of`."""
        return self._place(self.epoch_of(number), number)[0]

    def batches_before(self, epoch: int) -> int:
        """How many batches there are before an epoch: its first batch's number."""
        return sum(epoch * len(group) // count for group, count in zip(self.groups, self.batch_sizes, strict=True))

    def examples_before(self, number: int) -> int:
        """How many examples the batches before that one have."""
        epoch = self.epoch_of(number)
        whole = sum(
            epoch * len(group) // count * count for group, count in zip(self.groups, self.batch_sizes, strict=True)
        )
        sizes, _ = _order(self.seed, epoch, self._counts(epoch))
        of_epoch = np.bincount(sizes[: number - self.batches_before(epoch)], minlength=len(self.groups))
        return whole + int(of_epoch @ np.asarray(self.batch_sizes))

    def epoch_of(self, number: int) -> int:
        """The epoch that a batch is in.

        Raises:
            ValueError: the number is below 0.
        """
        if number < 0:
            raise ValueError(f"there is no batch {number}")
        low, high = 0, 1
        while self.batches_before(high) <= number:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.batches_before(middle) <= number else (low, middle)
        return low

    def waiting(self, epoch: int) -> tuple[int, ...]:
        """Of each size, how many examples of the first `epoch` epochs the batches before the next have not shown."""
        return tuple(
            epoch * len(group) - epoch * len(group) // count * count
            for group, count in zip(self.groups, self.batch_sizes, strict=True)
        )

    def _place(self, epoch: int, number: int) -> tuple[int, int]:
        """A batch's size, and how many batches of that size stand before it in its epoch."""
        sizes, before = _order(self.seed, epoch, self._counts(epoch))
        place = number - self.batches_before(epoch)
        return int(sizes[place]), int(before[place])

    def _counts(self, epoch: int) -> tuple[int, ...]:
        return tuple(
            (epoch + 1) * len(group) // count - epoch * len(group) // count
            for group, count in zip(self.groups, self.batch_sizes, strict=True)
        )


@dataclass(frozen=True)
class EachOnce:
    """Batches that show each example once, one size after the other; the last of each size begins again to be full.

    Attributes:
        groups: the examples of each size, an array each, in their order.
        batch_sizes: examples a batch of each size, over all hosts.
    """

    groups: tuple[Int[np.ndarray, " n"], ...]
    batch_sizes: tuple[int, ...]

    def batches(self) -> list[tuple[int, int]]:
        """Of each batch its size, and how many of its examples have not been shown yet."""
        return [
            (size, min(count, len(group) - first))
            for size, (group, count) in enumerate(zip(self.groups, self.batch_sizes, strict=True))
            for first in range(0, len(group), count)
        ]

    def batch(self, number: int) -> Batch:
        """The batch of that number; beyond the last one they begin again."""
        return self.following(number, 0, 0)

    def size_of(self, number: int) -> int:
        """See `Plan.size_of`."""
        return self.following(number, 0, 0).size

    def following(self, number: int, place: int, count: int) -> Batch:
        """See `Plan.following`."""
        numbers = [-(-len(group) // size) for group, size in zip(self.groups, self.batch_sizes, strict=True)]
        ends = np.cumsum(numbers)
        number %= int(ends[-1])
        size = int(np.searchsorted(ends, number, side="right"))
        first = (number - int(ends[size]) + numbers[size]) * self.batch_sizes[size] + place
        places = np.arange(first, first + (count or self.batch_sizes[size])) % len(self.groups[size])
        return Batch(size, self.groups[size][places])


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, counts: tuple[int, ...]) -> tuple[Int[np.ndarray, " b"], Int[np.ndarray, " b"]]:
    """For each batch of an epoch its size, and how many batches of that size stand before it in the epoch."""
    sizes = np.repeat(np.arange(len(counts)), counts)
    within = np.concatenate([np.arange(count) for count in counts]).astype(np.int64)
    offsets = np.random.default_rng((seed, 0, epoch)).random(len(sizes))
    order = np.argsort((within + offsets) / np.asarray(counts)[sizes], kind="stable")
    return sizes[order].astype(np.int16), within[order].astype(np.int32)


_TABLE = 2**16  # examples of a size up to which its permutations are tables
_ROUNDS = 6


def permuted(seed: int, size: int, cycle: int, count: int, places: Int[np.ndarray, " b"]) -> Int[np.ndarray, " b"]:
    """The values at some places of a permutation of `range(count)`, which is that of (seed, size, cycle)."""
    if count <= _TABLE:
        return _table(seed, size, cycle, count)[places]
    half = np.uint64((count - 1).bit_length() + 1 >> 1)  # bits: the network permutes a square of up to 4 x count
    keys = np.random.default_rng((seed, 1, size, cycle)).integers(0, 2**64, _ROUNDS, np.uint64)
    mask = np.uint64((1 << int(half)) - 1)
    values = places.astype(np.uint64)
    outside = np.ones(len(values), bool)
    while outside.any():  # who lands beyond the count walks on along his cycle, which comes back
        values[outside] = _feistel(values[outside], keys, half, mask)
        outside = values >= count
    return values.astype(np.int64)


def _feistel(values: np.ndarray, keys: np.ndarray, half: np.uint64, mask: np.uint64) -> np.ndarray:
    """A bijection on whole numbers of twice `half` bits (Luby and Rackoff 1988), mixed as splitmix64 does."""
    left, right = values >> half, values & mask
    for key in keys:
        mixed = right + key
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
    return (left << half) | right


@functools.lru_cache(maxsize=128)  # of at most 256 KiB each
def _table(seed: int, size: int, cycle: int, count: int) -> Int[np.ndarray, " n"]:
    return np.random.default_rng((seed, 1, size, cycle)).permutation(np.arange(count, dtype=np.int32))
