"""Sizes for pictures of every shape: against every choice there is, and what becomes of each picture."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offsetjax.data.buckets import Limits, Size, assign, candidate_sizes, check_sizes, chosen_sizes, parse_size
from offsetjax.errors import UserError

CANDIDATES = candidate_sizes(256 * 256, 64, 3.0)
ASPECTS = st.lists(st.floats(0.2, 5.0), min_size=1, max_size=12)


def lost(aspects: np.ndarray, sizes: tuple[Size, ...]) -> float:
    places = np.array([size.aspect for size in sizes])
    ratios = aspects[:, None] / places[None, :]
    return float((1 - np.minimum(ratios, 1 / ratios)).min(1).sum())


def test_sizes_are_of_near_equal_area_and_come_in_pairs() -> None:
    sizes = candidate_sizes(1024 * 1024, 64, 2.5)
    assert Size(1024, 1024) in sizes and Size(1152, 896) in sizes and Size(896, 1152) in sizes
    assert {Size(size.height, size.width) for size in sizes} == set(sizes)
    for width, height in sizes:
        assert width % 64 == height % 64 == 0 and width * height <= 1024 * 1024
        assert (min(width, height) + 64) * max(width, height) > 1024 * 1024 or width == height
        assert max(width, height) <= 2.5 * min(width, height)
    aspects = [size.aspect for size in sizes]
    assert aspects == sorted(aspects) and len(set(aspects)) == len(aspects)


@given(ASPECTS, st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_no_other_choice_loses_less(aspects: list[float], count: int) -> None:
    data = np.array(aspects)
    chosen = chosen_sizes(data, CANDIDATES, count)
    assert 1 <= len(chosen) <= count and set(chosen) <= set(CANDIDATES)
    every = (lost(data, choice) for k in range(1, count + 1) for choice in itertools.combinations(CANDIDATES, k))
    assert lost(data, chosen) == pytest.approx(min(every), abs=1e-9)


def test_repeated_pictures_weigh_more() -> None:
    aspects = np.array([0.5, 2.0])
    few, many = CANDIDATES[0], CANDIDATES[-1]
    assert chosen_sizes(aspects, (few, many), 1, np.array([3.0, 1.0])) == (few,)
    assert chosen_sizes(aspects, (few, many), 1, np.array([1.0, 3.0])) == (many,)


def test_no_more_sizes_than_are_of_use() -> None:
    square = chosen_sizes(np.ones(5), CANDIDATES, 4)
    assert square == (Size(256, 256),)


@given(st.lists(st.tuples(st.integers(1, 4000), st.integers(1, 4000)), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_each_picture_goes_where_the_least_of_it_is_cropped(pictures: list[tuple[int, int]]) -> None:
    widths, heights = np.array(pictures).T
    found = assign(widths, heights, CANDIDATES, Limits(max_aspect=3.0))
    places = np.array([size.aspect for size in found.sizes])
    for number, (width, height) in enumerate(pictures):
        if max(width, height) > 3 * min(width, height):
            assert found.is_extreme[number] and found.bucket[number] == -1 and found.loss[number] == 0
            continue
        ratios = width / height / places
        losses = 1 - np.minimum(ratios, 1 / ratios)
        assert found.loss[number] == pytest.approx(losses.min(), abs=1e-7)
        assert losses[found.bucket[number]] == pytest.approx(losses.min(), abs=1e-7)
    assert found.counts.sum() + (found.bucket < 0).sum() == len(pictures)


def test_a_picture_that_has_a_size_stays_in_it() -> None:
    sizes = (Size(512, 512), Size(1024, 1024), Size(512, 256))
    found = assign(np.array([512, 1024, 2048, 700]), np.array([512, 1024, 2048, 700]), sizes)
    assert [found.sizes[place] for place in found.bucket] == [sizes[0], sizes[1], sizes[1], sizes[1]]


def test_a_small_picture_falls_into_a_smaller_size_or_is_dropped() -> None:
    sizes = (Size(512, 512), Size(1024, 1024))
    found = assign(np.array([600, 1000, 300]), np.array([600, 1000, 300]), sizes, Limits(max_enlargement=1.25))
    assert [str(found.sizes[place]) for place in found.bucket[:2]] == ["512x512", "1024x1024"]
    assert found.bucket[2] == -1 and found.is_small.tolist() == [False, False, True]


@pytest.mark.parametrize("text", ["", "x", "512", "512x", "-1x2", "0x5", "1.5x2", "axb", "5x5x5"])
def test_a_size_that_is_none_is_answered(text: str) -> None:
    with pytest.raises(UserError, match="is no size; write width and height, such as 1152x896"):
        parse_size(text)


def test_sizes_that_no_network_takes_are_refused() -> None:
    assert parse_size("1152X896") == Size(1152, 896)
    check_sizes([Size(128, 64)], 64)
    with pytest.raises(UserError, match="1000x896 must be multiples of 64, such as 1024x896"):
        check_sizes([Size(1000, 896)], 64)
    with pytest.raises(UserError, match="128x64 is given twice"):
        check_sizes([Size(128, 64), Size(128, 64)], 64)
    with pytest.raises(UserError, match=r"data\.bucket_step = 64 is too much"):
        candidate_sizes(32 * 32, 64, 2.0)
