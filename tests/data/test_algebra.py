"""Splits of splits share exactly the pictures that they have in common; batches are a ring, from any number on."""

import contextlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from PIL import Image

from offsetjax.data.build import build
from offsetjax.data.record import Picture
from offsetjax.data.source import Source, open_source, split_names
from offsetjax.data.stream import make_stream
from offsetjax.errors import UserError
from tests.properties import checked, each_count

COUNTS = {"train": 17, "test": 5}


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Two splits, in shards of three pictures; a caption names its split and its number."""
    root = tmp_path_factory.mktemp("splits")
    for split, count in COUNTS.items():
        (root / "pictures" / split).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8)).save(root / "pictures" / split / f"{number:02}.png")
            (root / "pictures" / split / f"{number:02}.txt").write_text(f"{split} {number}")
    build(root / "pictures", root / "set", workers=1, shard_size=3)
    return root / "set"


@st.composite
def parts(draw: Callable[..., Any]) -> str:
    """A split, or a range of it in records or in percent, some of them out of it."""
    split, unit = draw(st.sampled_from(list(COUNTS))), draw(st.sampled_from(["", "%"]))
    bounds = st.none() | (st.integers(0, 100) if unit else st.integers(-20, 20))
    low, high = ("" if bound is None else f"{bound}{unit}" for bound in draw(st.tuples(bounds, bounds)))
    return draw(st.sampled_from([split, f"{split}[{low}:{high}]"]))


SPLITS = st.lists(parts(), min_size=1, max_size=3).map("+".join)


def _captions(source: Source) -> list[str]:
    return [source[index].caption for index in range(len(source))]


@each_count
def test_two_splits_share_records_where_they_share_captions(count: int, splits: pathlib.Path) -> None:
    @checked(count)
    @given(SPLITS, SPLITS)
    @example("train[:75%]", "train[75%:]")
    def holds(one: str, other: str) -> None:
        sources, captions = [], []
        for split in (one, other):
            with contextlib.suppress(UserError):  # an empty one
                sources.append(open_source(splits, split))
            assume(len(sources) > len(captions))
            captions.append(_captions(sources[-1]))
            assert {caption.split()[0] for caption in captions[-1]} <= split_names(split) <= COUNTS.keys()
            assert sources[-1].label.endswith(f"({split})") and sources[-1].fingerprint()["split"] == split
        is_shared = bool(set(captions[0]) & set(captions[1]))
        assert sources[0].shares_records(sources[1]) == sources[1].shares_records(sources[0]) == is_shared

    holds()


@dataclass(frozen=True)
class Numbers:
    """Pictures that say their number."""

    count: int
    label: str = "numbers"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Picture:
        return Picture(np.zeros((2, 2, 3), np.uint8), str(index))

    def fingerprint(self) -> Mapping[str, Any]:
        return {"count": self.count}

    def shares_records(self, other: Source) -> bool:
        return True


def _indices(count: int, batch: int, seed: int, start: int, rows: Sequence[int] | None = None, batches: int = 0) -> Any:
    stream = make_stream(
        Numbers(count),
        seed=seed,
        global_batch_size=batch,
        resolution=2,
        random_flip=False,
        tokenize=lambda caption: ({"text": np.array([int(caption)])}, 1, 1),
        rows=rows,
    )
    with contextlib.closing(stream.iterator(start)) as iterator:
        return np.stack([next(iterator)["index"] for _ in range(batches)])


@each_count
def test_batches_are_one_ring_for_any_number_of_processes_and_any_start(count: int) -> None:
    @checked(count)
    @given(
        num_examples=st.integers(1, 12),
        share=st.integers(1, 3),
        processes=st.integers(1, 3),
        seed=st.integers(0, 2**32 - 1),
        start=st.integers(0, 6),
    )
    def holds(num_examples: int, share: int, processes: int, seed: int, start: int) -> None:
        batch = share * processes
        whole = _indices(num_examples, batch, seed, 0, batches=8)
        ring = whole.reshape(-1)
        for epoch in range(len(ring) // num_examples):
            assert sorted(ring[epoch * num_examples : (epoch + 1) * num_examples]) == list(range(num_examples))
        np.testing.assert_array_equal(_indices(num_examples, batch, seed, start, batches=2), whole[start : start + 2])
        process = seed % processes
        rows = range(process * share, (process + 1) * share)
        mine = _indices(num_examples, batch, seed, start, rows, batches=2)
        np.testing.assert_array_equal(mine, whole[start : start + 2, list(rows)])

    holds()
