"""The stages between an order of examples and a process's batches, as Grain's data sets; `stream.py` joins them."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from offsetjax.data.batches import Batch, Plan
from offsetjax.data.buckets import Size
from offsetjax.data.sizes import Buckets

MOST_TRIES = 64  # records in a row that cannot be read: then it is not the records
_LATEST = 4  # batches of a plan that are remembered

Sized = tuple[int, Size]  # an example's number, and the size that it is brought to


class Planned(grain.MapDataset):
    """The examples of a plan's batches one after the other, each with its size.

    Each batch has as many places as the largest; those that it does not fill are None.
    """

    def __init__(self, buckets: Buckets):
        super().__init__()
        self._plan, self._sizes, self._places = buckets.plan, buckets.sizes, max(buckets.plan.batch_sizes)
        self._latest: dict[int, Batch] = {}  # their other examples are asked for next, by several threads

    def __len__(self) -> int:
        return sys.maxsize // self._places * self._places

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        number, place = divmod(index, self._places)
        batch = self._latest.get(number)
        if batch is None:
            batch = self._plan.batch(number)
            self._latest = {**dict(list(self._latest.items())[1 - _LATEST :]), number: batch}
        return int(batch.examples[place]), self._sizes[batch.size]

    def following(self, index: int) -> Iterator[Sized]:
        """The example of a place, and those of its size that follow it."""
        yield self[index]
        batch = self._plan.following(*divmod(index, self._places), MOST_TRIES)
        yield from ((int(example), self._sizes[batch.size]) for example in batch.examples[1:])


@dataclass(frozen=True)
class Share:
    """Which rows of each batch are one process's; workers are sent it, so that it holds no tokenizer.

    Attributes:
        rows: by the size of a batch.
        plan: None where all batches have as many.
    """

    rows: Mapping[int, tuple[int, ...]]
    plan: Plan | None

    @property
    def places(self) -> int:
        """Those of the largest batch."""
        return max(self.rows)

    @property
    def most(self) -> int:
        """Of a batch, the rows of this process at most."""
        return max(map(len, self.rows.values()))

    @property
    def is_even(self) -> bool:
        """Whether all batches have as many examples."""
        return self.plan is None or len(self.rows) == 1

    def of(self, number: int) -> tuple[int, ...]:
        """The rows of a batch that are this process's."""
        if self.plan is None or self.is_even:
            return next(iter(self.rows.values()))
        return self.rows[self.plan.batch_sizes[self.plan.size_of(number)]]


class Rows(grain.MapDataset):
    """The examples of one process: its i-th, of at most m a batch, is row r[i % m] of batch i // m, if that has one."""

    def __init__(self, parent: grain.MapDataset, share: Share):
        super().__init__(parent)
        self._share = share

    def __len__(self) -> int:
        return sys.maxsize // self._share.places * self._share.most

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        batch, place = divmod(index, self._share.most)
        rows = self._share.of(batch)
        return self._parent[batch * self._share.places + rows[place]] if place < len(rows) else None


class Batches(grain.MapDataset):
    """Whole batches of those examples, each read by one who asks for it."""

    def __init__(self, parent: grain.MapDataset, share: Share):
        super().__init__(parent)
        self._most = share.most

    def __len__(self) -> int:
        return len(self._parent) // self._most

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        found = (self._parent[index * self._most + place] for place in range(self._most))
        return _stacked([each for each in found if each is not None])


class BatchesOfThreads(grain.IterDataset):
    """The same, of examples that several threads read one by one."""

    def __init__(self, parent: grain.IterDataset, share: Share, first: int):
        super().__init__(parent)
        self._share, self._first = share, first

    def __iter__(self) -> grain.DatasetIterator:
        return _BatchIterator(self._parent.__iter__(), self._share, self._first)


class _BatchIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, share: Share, number: int):
        super().__init__(parent)
        self._share, self._number = share, number

    def __next__(self) -> dict[str, Any]:
        count = len(self._share.of(self._number))
        self._number += 1
        return _stacked([next(self._parent) for _ in range(count)])

    def get_state(self) -> dict[str, Any]:
        """Grain's."""
        return {"parent": self._parent.get_state(), "number": self._number}

    def set_state(self, state: dict[str, Any]) -> None:
        """Grain's."""
        self._parent.set_state(state["parent"])
        self._number = state["number"]


def _stacked(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {name: np.stack([np.asarray(each[name]) for each in examples]) for name in examples[0]}


class Order(grain.MapDataset):
    """Of each place in the order, its example and those that follow it, looked up as they are read."""

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        return Following(self._parent, index)


@dataclass(frozen=True)
class Following:
    """The example at a place of an order, and those that follow it."""

    order: grain.MapDataset
    place: int

    def __iter__(self) -> Iterator[Sized]:
        if isinstance(self.order, Planned):
            return self.order.following(self.place)
        return (self.order[place] for place in range(self.place, self.place + MOST_TRIES))
