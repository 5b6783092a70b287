r"""Which examples each batch holds, where batches have different sizes: a pure function of (data, seed, number).

Each size s has n_s examples, B_s to a batch. Its examples come in an endless sequence, one permutation of all of them
after another; a batch takes the next B_s, over the end of a permutation where it must. So no example is left out, and
of each size no more than B_s - 1 examples wait at the end of an epoch for the first batch of the next.

An epoch E has, of each size,

    k_s(E) = ⌊(E + 1) n_s / B_s⌋ - ⌊E n_s / B_s⌋     batches

in an order that spreads them: batch i of k_s stands at the place (i + u) / k_s of the epoch, u uniform on [0, 1). A
size that has fewer examples than a batch gets one batch every few epochs, and a size of many no runs that chance would
not give.

The position is one integer, the number of the batch; every host computes the same plan without talking.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from offsetjax.errors import UserError


class Batch(NamedTuple):
    """One batch: the place of its size, and its examples."""

    size: int
    examples: Int[np.ndarray, " b"]


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
        epoch = self.epoch_of(number)
        size, before = self._order(epoch)[number - self.batches_before(epoch)]
        count, all_ = self.batch_sizes[size], len(self.groups[size])
        begin = (epoch * all_ // count + before) * count
        places = np.arange(begin, begin + count)
        cycles, places = np.divmod(places, all_)
        examples = np.empty(count, np.int64)
        for cycle in np.unique(cycles):
            mine = cycles == cycle
            examples[mine] = self.groups[size][self._permutation(size, int(cycle))[places[mine]]]
        return Batch(size, examples)

    def size_of(self, number: int) -> int:
        """The place of a batch's size, without its examples."""
        epoch = self.epoch_of(number)
        return self._order(epoch)[number - self.batches_before(epoch)][0]

    def batches_before(self, epoch: int) -> int:
        """How many batches there are before an epoch: its first batch's number."""
        return sum(epoch * len(group) // count for group, count in zip(self.groups, self.batch_sizes, strict=True))

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

    def _order(self, epoch: int) -> Sequence[tuple[int, int]]:
        return _order(self.seed, epoch, self._counts(epoch))

    def _counts(self, epoch: int) -> tuple[int, ...]:
        return tuple(
            (epoch + 1) * len(group) // count - epoch * len(group) // count
            for group, count in zip(self.groups, self.batch_sizes, strict=True)
        )

    def _permutation(self, size: int, cycle: int) -> Int[np.ndarray, " n"]:
        return _permutation(self.seed, size, cycle, len(self.groups[size]))


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, counts: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """For each batch of an epoch its size, and how many batches of that size stand before it in the epoch."""
    sizes = np.repeat(np.arange(len(counts)), counts)
    within = np.concatenate([np.arange(count) for count in counts]).astype(np.int64)
    offsets = np.random.default_rng((seed, 0, epoch)).random(len(sizes))
    order = np.argsort((within + offsets) / np.asarray(counts)[sizes], kind="stable")
    return tuple(zip(sizes[order].tolist(), within[order].tolist(), strict=True))


@functools.lru_cache(maxsize=32)
def _permutation(seed: int, size: int, cycle: int, count: int) -> Int[np.ndarray, " n"]:
    dtype = np.int32 if count < 2**31 else np.int64
    return np.random.default_rng((seed, 1, size, cycle)).permutation(np.arange(count, dtype=dtype))
