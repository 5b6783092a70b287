"""Several sources as one: each with its share of the examples, or with repeats, and captions of its own.

An epoch is as long as it takes to show every picture of each at least once. A source that needs fewer examples for that
than its share shows pictures again, each as often as any other or once more. So the order of the examples stays one
permutation an epoch, of which batches, sizes and resumptions know nothing.
"""

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from offsetjax.errors import UserError

_MOST = 2**31 - 1  # examples of an epoch


@dataclass(frozen=True)
class Mixed:
    """A source of several.

    Attributes:
        sources: they.
        counts: of each, the examples in an epoch.
        captions: of each, the caption rules that differ from the training's.
    """

    sources: tuple[Any, ...]
    counts: tuple[int, ...]
    captions: tuple[Mapping[str, Any], ...]

    @property
    def label(self) -> str:
        return "a mix of " + ", ".join(source.label for source in self.sources)

    @cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(self.counts))

    def __len__(self) -> int:
        return self._ends[-1]

    def located(self, index: int) -> tuple[int, int]:
        """Of which source an example is, and which of its records."""
        number = bisect.bisect_right(self._ends, index)
        before = self._ends[number] - self.counts[number]
        return number, (int(index) - before) % len(self.sources[number])

    def __getitem__(self, index: int) -> Any:
        number, place = self.located(index)
        return self.sources[number][place]

    def fingerprint(self) -> dict[str, Any]:
        of_each = [dict(source.fingerprint()) for source in self.sources]
        return {"num_examples": len(self), "mix": of_each, "counts": list(self.counts)}

    def shares_records(self, other: Any) -> bool:
        others = other.sources if isinstance(other, Mixed) else (other,)
        return any(source.shares_records(each) for source in self.sources for each in others)

    def __str__(self) -> str:
        shares = (
            f"{source.label} ({len(source):,} pictures, {count / len(self):.1%} of the examples)"
            for source, count in zip(self.sources, self.counts, strict=True)
        )
        return f"a mix, {len(self):,} examples an epoch: " + "; ".join(shares)


def mixed(
    sources: Sequence[Any], weights: Sequence[float], repeats: Sequence[int], captions: Sequence[Mapping[str, Any]]
) -> Mixed:
    """Mixes sources.

    Args:
        weights: their shares of the examples, over the sum of all; all 0: by `repeats`.
        repeats: how often each picture of a source comes in an epoch.

    Raises:
        UserError: an epoch would be longer than 2**31 - 1 examples.
    """
    lengths = list(map(len, sources))
    if not all(weights):
        counts = [length * times for length, times in zip(lengths, repeats, strict=True)]
    else:
        longest = max(length / weight for length, weight in zip(lengths, weights, strict=True))
        most = longest * sum(weights)
        counts = (
            []
            if most > _MOST
            else [max(length, round(weight * longest)) for length, weight in zip(lengths, weights, strict=True)]
        )
    if not counts or sum(counts) > _MOST:
        raise UserError(
            f"config: data.mix shows every picture of each data set in an epoch, which would be longer than {_MOST} "
            "examples; bring data.weight or data.repeats nearer to each other"
        )
    return Mixed(tuple(sources), tuple(counts), tuple(captions))
