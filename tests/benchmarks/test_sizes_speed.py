"""Batches of several sizes beside those of squares: `launch/local.sh test tests/benchmarks -m slow -s -k sizes`.

The two are timed in turns, for timings on one machine drift together. Real pictures of many shapes are Tux Paint's
stamps, where they are installed.
"""

import contextlib
import dataclasses
import io
import resource
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from offsetjax.data.buckets import Limits
from offsetjax.data.record import Picture
from offsetjax.data.sizes import make_buckets
from offsetjax.data.stream import Stream, make_stream

SIDE, BATCH, ROUNDS = 256, 16, 5
SHAPES = ((384, 384), (480, 320), (320, 480), (512, 288), (288, 512), (448, 352), (352, 448))  # of about the same area


@dataclasses.dataclass(eq=False)
class Pictures:
    """JPEGs of several shapes, or one array for all of them, each seen many times."""

    images: list[Any]
    length: int
    label: str = "pictures"

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Picture:
        return Picture(self.images[index % len(self.images)], "a caption", f"{index}.jpg")

    def sizes(self) -> np.ndarray:
        """The sizes, from the first pictures."""
        found = np.array([tuple(Picture(each, "").size()) for each in self.images], np.int32)
        return np.resize(found, (self.length, 2))

    def fingerprint(self) -> dict[str, Any]:
        return {}


def jpegs() -> Pictures:
    """Noise that has been smoothed, so that its files are as large as photographs'."""
    rng, images = np.random.default_rng(0), []
    for width, height in SHAPES * 8:
        coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8))
        buffer = io.BytesIO()
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
        images.append(buffer.getvalue())
    return Pictures(images, 100_000)


def stream_of(source: Any, count: int, resolution: int = SIDE, batch: int = BATCH) -> Stream:
    """Squares where `count` is 0."""
    options: dict[str, Any] = {"given": (), "resolution": resolution, "step": 8, "unit": 8, "limits": Limits()}
    buckets = make_buckets(source, count=count, batch_size=batch, seed=0, **options) if count else None
    ids = {"text": np.zeros(77, np.int32)}
    return make_stream(
        source,
        seed=0,
        global_batch_size=batch,
        resolution=resolution,
        random_flip=True,
        tokenize=lambda caption: (ids, 1, 77),
        buckets=buckets,
    )


def images_a_second(batches: Iterator[Any], count: int = 12) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * BATCH / (time.perf_counter() - begin)


@pytest.mark.slow
def test_sizes_are_read_as_fast_as_squares() -> None:
    source, rates = jpegs(), {0: list[float](), 7: list[float]()}
    with contextlib.ExitStack() as stack:
        opened = {
            count: stack.enter_context(contextlib.closing(stream_of(source, count).iterator())) for count in rates
        }
        for batches in opened.values():
            images_a_second(batches, 4)
        for _ in range(ROUNDS):
            for count, batches in opened.items():
                rates[count].append(images_a_second(batches))
    square, sizes = (float(np.median(each)) for each in rates.values())
    print(f"squares {square:.0f} images/s, seven sizes {sizes:.0f}: {sizes / square:.2f}")
    assert sizes >= 0.95 * square


@pytest.mark.slow
def test_the_first_batch_of_millions_is_there_soon() -> None:
    source = dataclasses.replace(jpegs(), length=10_000_000)
    begin = time.perf_counter()
    stream = stream_of(source, 7)
    planned = time.perf_counter()
    with contextlib.closing(stream.iterator(3_000_000)) as batches:
        next(batches)
    first = time.perf_counter()
    print(f"planned in {planned - begin:.1f} s, the first batch after {first - planned:.2f} s")
    assert planned - begin < 10 and first - planned < 5


@pytest.mark.slow
def test_memory_is_flat_over_a_hundred_thousand_batches() -> None:
    rng = np.random.default_rng(0)
    shapes = [(8, 8), (12, 6), (6, 12)]
    images = [rng.integers(0, 256, (height, width, 3), np.uint8) for width, height in shapes]
    stream = stream_of(Pictures(images, 10_000), 3, resolution=8, batch=2)
    with contextlib.closing(stream.iterator()) as batches:
        for _ in range(2_000):
            next(batches)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(98_000):
            next(batches)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"the most memory that was held has grown by {grown:.1f} MiB")
    assert grown < 16


@pytest.mark.slow
def test_a_step_does_not_wait_for_its_batch() -> None:
    waited, step = 0.0, 0.25  # seconds; a batch is read in a part of it on two cores
    with contextlib.closing(stream_of(jpegs(), 7).iterator()) as batches:
        next(batches)
        for _ in range(40):
            time.sleep(step)  # as the devices work
            begin = time.perf_counter()
            next(batches)
            waited += time.perf_counter() - begin
    print(f"{waited / (40 * step):.2%} of a step waits")
    assert waited < 0.02 * 40 * step
