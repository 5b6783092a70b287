"""A batch is a function of (data, seed, number): each example once an epoch, no size starved, none in runs."""

import dataclasses
import itertools
import time
import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offsetjax.data.batches import BatchPlan, permuted
from offsetjax.data.buckets import Limits
from offsetjax.data.sizes import make_buckets
from offsetjax.errors import UserError


def plan_of(counts: list[int], batch_sizes: list[int], seed: int = 0) -> BatchPlan:
    bounds = np.cumsum([0, *counts])
    groups = tuple(np.arange(first, last) for first, last in itertools.pairwise(bounds))
    return BatchPlan(groups, tuple(batch_sizes), seed)


SIZES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 7)), min_size=1, max_size=5).filter(
    lambda pairs: any(count for count, _ in pairs)
)


@given(SIZES, st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_over_any_time_each_example_is_seen_as_often_as_any_other(pairs: list[tuple[int, int]], seed: int) -> None:
    counts, batch_sizes = map(list, zip(*pairs, strict=True))
    plan = plan_of(counts, batch_sizes, seed)
    epochs = 5
    seen: Counter[int] = Counter()
    for number in range(plan.batches_before(epochs)):
        size, examples = plan.batch(number)
        assert len(examples) == batch_sizes[size] and set(examples) <= set(plan.groups[size].tolist())
        assert plan.size_of(number) == size
        seen.update(examples.tolist())
        for group in plan.groups:  # at every moment
            times = [seen[int(example)] for example in group]
            assert not times or max(times) - min(times) <= 1
    # At the end of each epoch less than a batch of each size has to wait for the next.
    for group, count, waiting in zip(plan.groups, batch_sizes, plan.waiting(epochs), strict=True):
        assert 0 <= waiting < count
        assert sum(seen[int(example)] for example in group) == epochs * len(group) - waiting


def test_what_waits_changes_from_epoch_to_epoch() -> None:
    plan = plan_of([10], [4])
    late = []
    for epoch in range(1, 6):
        seen = Counter(
            example for number in range(plan.batches_before(epoch)) for example in plan.batch(number).examples.tolist()
        )
        late.append(frozenset(example for example in range(10) if seen[example] < epoch))
    assert [len(each) for each in late] == [2, 0, 2, 0, 2]
    assert len(set(late)) == 4  # the empty one, and three that differ


def test_a_size_of_few_pictures_has_its_turn() -> None:
    plan = plan_of([1000, 2, 3], [4, 4, 4])
    batches = Counter(plan.size_of(number) for number in range(plan.batches_before(8)))
    assert batches == {0: 2000, 1: 4, 2: 6}
    size, examples = next(each for each in map(plan.batch, range(plan.batches_before(2))) if each.size == 1)
    assert sorted(examples) == [1000, 1000, 1001, 1001] and size == 1


def test_no_size_comes_in_runs() -> None:
    plan = plan_of([400, 400, 400], [4, 4, 4])
    sizes = [plan.size_of(number) for number in range(plan.batches_before(1))]
    longest = max(len(list(run)) for _, run in itertools.groupby(sizes))
    assert longest <= 6  # in a random order, of the 300, it is 5 in the mean and 9 in one of a hundred
    for begin in range(0, 300, 30):
        assert all(abs(sizes[begin : begin + 30].count(size) - 10) <= 2 for size in range(3))


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        plan = plan_of([12, 12], [3, 3], seed)
        return [plan.batch(epoch * 8 + number).examples.tolist() for number in range(8)]

    assert len({str(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_a_written_out_plan() -> None:
    """What a resumed run, or another version, must give again."""
    plan = plan_of([5, 2], [2, 2], seed=7)
    assert [(each.size, each.examples.tolist()) for each in map(plan.batch, range(7))] == WRITTEN


WRITTEN = [(0, [3, 0]), (1, [5, 6]), (0, [2, 1]), (0, [4, 4]), (0, [3, 0]), (0, [1, 2]), (1, [5, 6])]


def test_repeats_are_seen_as_often_as_they_stand_there() -> None:
    plan = BatchPlan((np.array([0, 1, 1, 1]),), (2,), 0)
    seen = Counter(example for number in range(20) for example in plan.batch(number).examples.tolist())
    assert seen == {0: 10, 1: 30}


def test_ten_million_pictures_take_seconds_and_little_memory() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(300, 700, (10_000_000, 2), np.int32)
    tracemalloc.start()
    began = time.perf_counter()
    buckets = make_buckets(
        Measured(sizes),  # type: ignore[arg-type]
        given=(),
        count=7,
        resolution=512,
        step=64,
        unit=8,
        limits=Limits(),
        batch_size=1024,
        seed=0,
    )
    for number in range(50):
        buckets.plan.batch(number)
    buckets.fingerprint()
    assert time.perf_counter() - began < 20  # where it was tried, 5
    assert tracemalloc.get_traced_memory()[1] < 200e6
    tracemalloc.stop()


@dataclasses.dataclass(eq=False)
class Measured:
    """A source that knows its sizes."""

    known: np.ndarray
    label: str = "measured"

    def sizes(self) -> np.ndarray:
        return self.known


PICTURES = st.one_of(
    st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=40),  # any, slivers too
    st.builds(
        lambda size, count: [size] * count, st.tuples(st.integers(8, 99), st.integers(8, 99)), st.integers(1, 20)
    ),
)


@given(PICTURES, st.integers(1, 9), st.integers(1, 6), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_set_of_pictures_makes_batches(
    pictures: list[tuple[int, int]], batch_size: int, count: int, by_tokens: bool
) -> None:
    options: dict[str, Any] = {"given": (), "resolution": 64, "step": 8, "unit": 8, "limits": Limits(), "seed": 0}
    options |= {"batch_size": batch_size, "count": count, "equal_tokens": by_tokens}
    source = Measured(np.array(pictures, np.int32))
    if all(max(each) > 3 * min(each) for each in pictures):
        with pytest.raises(UserError, match=r"longer than data\.max_aspect"):
            make_buckets(source, **options)  # type: ignore[arg-type]
        return
    buckets = make_buckets(source, **options)  # type: ignore[arg-type]
    plan, assignment = buckets.plan, buckets.assignment
    assert isinstance(plan, BatchPlan)
    assert 1 <= len(buckets.sizes) <= count and all(assignment.counts), "each size has pictures, or is not compiled"
    assert [max(each) > 3 * min(each) for each in pictures] == assignment.is_extreme.tolist()
    epochs, seen = 3, Counter[int]()
    for number in range(plan.batches_before(epochs)):
        size, examples = plan.batch(number)
        assert len(examples) == plan.batch_sizes[size] and (assignment.bucket[examples] == size).all()
        stands_in = plan.following(number, len(examples) - 1, 3)
        assert stands_in.size == size and stands_in.examples[0] == examples[-1]
        seen.update(examples.tolist())
    kept = np.flatnonzero(assignment.bucket >= 0).tolist()
    assert set(seen) <= set(kept)
    for group in plan.groups:
        times = [seen[int(index)] for index in group]
        assert max(times) - min(times) <= 1
    assert sum(epochs - seen[index] for index in kept) == sum(plan.waiting(epochs))
    assert plan.examples_before(plan.batches_before(epochs)) == sum(seen.values())
    assert "".join(buckets.describe()).count("pictures") >= 1


@given(st.integers(2**16 + 1, 2**17), st.integers(0, 2**32 - 1))
@settings(max_examples=5, deadline=None)
def test_many_examples_are_permuted_without_a_table(count: int, seed: int) -> None:
    found = permuted(seed, 1, 2, count, np.arange(count))
    assert np.array_equal(np.sort(found), np.arange(count))
    few = np.array([5, count - 1, 0])
    assert np.array_equal(permuted(seed, 1, 2, count, few), found[few])
    other = permuted(seed, 1, 3, count, np.arange(count))
    # As of random permutations: a place keeps its value once in the mean, neighbours do not stay together.
    assert (found == np.arange(count)).sum() < 12 and (found == other).sum() < 12
    assert abs(np.corrcoef(found, np.arange(count))[0, 1]) < 0.03
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 0.03
    assert abs((found[::2] & 1).mean() - 0.5) < 0.02


def test_mistakes_are_answered() -> None:
    with pytest.raises(UserError, match="no picture fits any of the sizes"):
        plan_of([0], [2])
    with pytest.raises(ValueError, match="there is no batch -1"):
        plan_of([3], [2]).batch(-1)
