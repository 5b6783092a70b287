"""Pictures of several sizes: which size each has, batches of one size each, and a training from them."""

import contextlib
import dataclasses
import json
import pathlib
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes

from offsetjax.config import validate
from offsetjax.data.buckets import Limits, Size
from offsetjax.data.record import Picture
from offsetjax.data.shards import SIZES_FILE
from offsetjax.data.sizes import Buckets, cropped, make_buckets, measured, once_each, sizes_of, suited
from offsetjax.data.sizes_figure import sizes_figure
from offsetjax.data.source import Source, open_source
from offsetjax.data.stream import make_stream
from offsetjax.errors import UserError
from offsetjax.progress import heard_by
from offsetjax.train import train
from tests import tiny
from tests.data.shapes import COUNT, SIZES, pictures_of_shapes

BATCH = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return pictures_of_shapes(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def source(folder: pathlib.Path) -> Source:
    return open_source(folder)


def buckets_of(source: Source, **changes: Any) -> Buckets:
    options = {"given": (), "count": 3, "resolution": 16, "step": 4, "unit": 2, "limits": Limits(), "seed": 0}
    return make_buckets(source, **{**options, "batch_size": BATCH, **changes})


def take(source: Source, count: int, start: int = 0, **changes: Any) -> list[dict[str, Any]]:
    options: dict[str, Any] = {"seed": 3, "global_batch_size": BATCH, "resolution": 16, "random_flip": True}
    options |= {"tokenize": lambda caption: ({"text": np.array([int(caption)])}, 1, 1), "buckets": buckets_of(source)}
    batches = make_stream(source, **{**options, **changes}).iterator(start)
    with contextlib.closing(batches):
        return [next(batches) for _ in range(count)]


def test_sizes_are_noted_by_the_build_and_are_those_of_the_headers(folder: pathlib.Path, source: Source) -> None:
    expected = [SIZES[number % len(SIZES)] for number in range(COUNT)]
    assert measured(source).tolist() == sizes_of(source).tolist() == [list(size) for size in expected]
    some = open_source(folder, "train[8:23]")
    assert measured(some).tolist() == [list(size) for size in expected[8:23]]


def test_a_damaged_note_of_sizes_is_named(folder: pathlib.Path, source: Source, tmp_path: pathlib.Path) -> None:
    copy = tmp_path / "copy"
    for file in folder.rglob("*"):
        if file.is_file():
            (copy / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (copy / file.relative_to(folder)).write_bytes(file.read_bytes())
    note = next(copy.rglob(SIZES_FILE))
    good, opened, named = note.read_bytes(), open_source(copy), list[str]()
    places = range(0, len(good), 5)
    for place in places:  # zlib, zipfile and NumPy each raise an error of their own; a few bytes do not matter
        note.write_bytes(good[:place] + bytes([good[place] ^ 16]) + good[place + 1 :])
        try:
            assert opened.sizes().tolist() == measured(source).tolist()  # type: ignore[attr-defined]
        except UserError as error:
            named.append(str(error))
    assert len(named) > len(places) // 3
    note.write_bytes(good[:-40])
    with pytest.raises(UserError, match=r"sizes\.npz is damaged \(.*\); build the data set again"):
        measured(open_source(copy))
    note.unlink()
    assert len(measured(open_source(copy))) == COUNT


@dataclasses.dataclass
class Headers:
    """A source of which only the headers are read: 200 pictures, of which some have none."""

    bad: tuple[int, ...]
    label: str = "headers"

    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: int) -> Picture:
        if index == 7:
            raise UserError("data: record 7 of headers cannot be read: damaged")
        return Picture(b"no picture" if index in self.bad else np.zeros((16, 24, 3), np.uint8), "", f"{index}.png")


def test_a_picture_without_a_header_is_left_out_and_named() -> None:
    steps = list[int]()
    with heard_by(lambda: steps.append(1)):
        buckets = buckets_of(Headers(bad=(3,)), given=("24x16",), resolution=20, max_bad_fraction=0.01)  # type: ignore[arg-type]
    assert steps, "a watchdog hears of it"
    assert np.flatnonzero(buckets.assignment.is_unreadable).tolist() == [3, 7]
    assert {3, 7}.isdisjoint(buckets.plan.groups[0].tolist()) and len(buckets.plan.groups[0]) == 198
    first, second = buckets.notes
    assert "record 3 (3.png) of headers is no picture" in first and first.endswith("; it is left out")
    assert second.startswith("data: record 7 of headers cannot be read")
    assert list(buckets.describe())[-1].endswith("0 for their size, 2 that cannot be read")
    with pytest.raises(
        UserError, match=r"record 3 .* is no picture.*\(and 2 more .*or raise data\.max_bad_fraction = 0\.01"
    ):
        buckets_of(Headers(bad=(3, 9)), given=("24x16",), max_bad_fraction=0.01)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="record 7 of headers cannot be read"):
        buckets_of(Headers(bad=()), given=("24x16",))  # type: ignore[arg-type]
    held_out, plan = once_each(Headers(bad=(3,)), {Size(24, 16): 8}, Limits(), 1000)  # type: ignore[arg-type]
    assert len(plan.groups[0]) == 198 and len(held_out.notes) == 2 and "record 3" in held_out.notes[0]


def test_sizes_of_another_area_than_the_resolution_are_noted(source: Source) -> None:
    assert buckets_of(source, given=("16x16", "24x16"), resolution=18).notes == ()
    [note] = buckets_of(source, given=("32x32", "48x24")).notes
    assert re.search(r"area of a square of 3\d pixels, but data\.resolution = 16, .*; set it to about 3\d$", note)


def test_what_was_measured_is_not_measured_again() -> None:
    source = Headers(bad=())
    assert measured(source) is measured(source)  # type: ignore[arg-type]
    assert measured(Headers(bad=(3,))) is not measured(source)  # type: ignore[arg-type]


def test_sizes_are_chosen_for_the_pictures_and_slivers_are_left_out(source: Source) -> None:
    buckets = buckets_of(source)
    assert buckets.sizes == (Size(12, 20), Size(16, 16), Size(20, 12))
    assert int(buckets.assignment.is_extreme.sum()) == 5  # 100x10
    *each, last = buckets.describe()
    assert [line.partition(":")[0] for line in each] == [str(size) for size in buckets.sizes]
    assert last.startswith("30 of 35 pictures, ") and last.endswith("left out: 5 for their shape, 0 for their size")
    small = buckets_of(source, given=("16x16", "24x16"), limits=Limits(max_enlargement=1.0))
    assert int(small.assignment.is_small.sum()) == 5  # 8x8


def test_more_sizes_crop_less(source: Source) -> None:
    by_count = suited(measured(source), (1, 3, 5), resolution=1024, step=64)
    lost = [cropped(each) for each in by_count]
    # By squares: nothing of two sorts, a third of three, a half of one.
    assert lost[0] == pytest.approx((3 * 1 / 3 + 1 / 2) / 6)
    assert lost[0] > lost[1] >= lost[2] >= 0 and lost[1] < 0.06
    figure = sizes_figure(measured(source), by_count[1], (1, 3, 5), lost)
    texts = [text.get_text() for axes in figure.findobj(Axes) for text in axes.texts]
    for size, count in zip(by_count[1].sizes, by_count[1].counts, strict=True):
        assert any(text.startswith(f"{size.width} x {size.height}\n{count:,} pictures") for text in texts)
    assert "5 of 35 pictures are left out" in figure.findobj(Axes)[0].get_title(loc="left")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"given": ("16x16", "24x15")}, r"data\.buckets: 24x15 must be multiples of 2, such as 24x16"),
        ({"given": ("16x16", "16 by 24")}, r"data\.buckets: '16 by 24' is no size; write width and height, such as"),
        ({"given": ("16x16", "8x128")}, r"no picture of .* goes to 8x128 of data\.buckets, .*; leave it out"),
        ({"step": 9}, r"data\.bucket_step = 9 must be a multiple of 2"),
        ({"limits": Limits(max_enlargement=0.01)}, r"no picture fits any of the sizes; see data\.buckets and"),
        ({"step": 32}, r"data\.bucket_step = 32 is too much for pictures of 256 pixels"),
    ],
)
def test_what_cannot_be_is_one_line(changes: dict[str, Any], message: str, source: Source) -> None:
    with pytest.raises(UserError, match=message):
        buckets_of(source, **changes)


def test_a_batch_has_one_size_and_its_pictures_are_scaled_and_cropped_to_it(source: Source) -> None:
    given = ("16x16", "24x16", "16x24")
    seen: Counter[tuple[int, ...]] = Counter()
    for batch in take(source, 24, buckets=buckets_of(source, given=given), random_flip=False):
        height, width = batch["pixels"].shape[1:3]
        seen[width, height] += 1
        for row, index in enumerate(batch["index"].tolist()):
            of = Size(*SIZES[index % len(SIZES)])
            scale = max(width / of.width, height / of.height)
            top, left = (of.height * scale - height) / 2, (of.width * scale - width) / 2
            np.testing.assert_allclose(batch["time_ids"][row], [of.height, of.width, top, left, height, width], 1e-6)
            assert batch["pixels"][row, height // 2, 0, 0] == 7 * index + 1
            assert batch["input_ids"]["text"][row] == index
    assert set(seen) == {(16, 16), (24, 16), (16, 24)}


def test_each_example_is_seen_once_an_epoch_but_for_those_that_wait(source: Source) -> None:
    buckets = buckets_of(source)
    plan, epochs = buckets.plan, 6
    batches = take(source, plan.batches_before(epochs), buckets=buckets)
    counts = Counter(np.concatenate([batch["index"] for batch in batches]).tolist())
    kept = np.flatnonzero(buckets.assignment.bucket >= 0).tolist()
    assert set(counts) == set(kept)
    assert sum(epochs - counts[index] for index in kept) == sum(plan.waiting(epochs))
    assert set(counts.values()) <= {epochs - 1, epochs}


def test_batches_are_a_function_of_their_number_whatever_reads_them(source: Source) -> None:
    expected = take(source, 12)
    for found in (take(source, 5, 7), take(source, 12, num_workers=2)[7:]):
        for one, other in zip(found, expected[7:], strict=True):
            assert one["pixels"].shape == other["pixels"].shape
            for name in ("pixels", "time_ids", "index"):
                np.testing.assert_array_equal(one[name], other[name])
    halves = [take(source, 12, rows=rows) for rows in ((0, 2), (1, 3))]
    for number, batch in enumerate(expected):
        for half, rows in zip(halves, ((0, 2), (1, 3)), strict=True):
            np.testing.assert_array_equal(half[number]["pixels"], batch["pixels"][list(rows)])


def test_batches_of_as_many_pixels_are_the_same_whatever_reads_them(source: Source) -> None:
    options: dict[str, Any] = {"given": ("8x8", "16x16", "24x16", "32x32"), "resolution": 16, "equal_tokens": 2}
    buckets = buckets_of(source, **options)
    by_size = dict(zip(buckets.sizes, buckets.plan.batch_sizes, strict=True))
    assert by_size == {Size(8, 8): 16, Size(16, 16): 4, Size(24, 16): 2, Size(32, 32): 2}
    assert buckets.notes == () and "1.2 batches of 4" in "".join(buckets.describe())
    expected = take(source, 14, buckets=buckets)
    number_of = {16: 8, 4: 2, 2: 1}  # rows of each of two processes
    for batch in expected:
        height, width = batch["pixels"].shape[1:3]
        assert len(batch["index"]) == by_size[Size(width, height)]
    for found in (take(source, 9, 5, buckets=buckets), take(source, 14, buckets=buckets, num_workers=2)[5:]):
        for one, other in zip(found, expected[5:], strict=True):
            for name in ("pixels", "time_ids", "index"):
                np.testing.assert_array_equal(one[name], other[name])
    first = {size: tuple(range(size // 2)) for size in number_of}
    for half, batch in zip(take(source, 14, buckets=buckets, rows=first), expected, strict=True):
        np.testing.assert_array_equal(half["pixels"], batch["pixels"][: len(batch["index"]) // 2])
    stream = make_stream(
        source,
        seed=3,
        global_batch_size=BATCH,
        resolution=16,
        random_flip=True,
        tokenize=lambda caption: ({}, 1, 1),
        buckets=buckets,
        rows=first,
    )
    assert stream.whole_size(8) == 16 and stream.batch_sizes == by_size
    lengths = [len(batch["index"]) for batch in expected]
    assert [stream.examples_before(number) for number in range(14)] == np.cumsum([0, *lengths])[:14].tolist()
    assert [stream.examples_of(number) for number in range(14)] == [batch["index"].tolist() for batch in expected]


def test_random_crops_leave_all_else_as_it_is(source: Source) -> None:
    given = ("16x16", "24x16")
    usual = take(source, 12, buckets=buckets_of(source, given=given))
    drawn = take(source, 12, buckets=buckets_of(source, given=given), random_crop=True)
    again = take(source, 5, 7, buckets=buckets_of(source, given=given), random_crop=True)
    moved = 0
    for one, other in zip(usual, drawn, strict=True):
        np.testing.assert_array_equal(one["index"], other["index"])
        np.testing.assert_array_equal(one["time_ids"][:, [0, 1, 4, 5]], other["time_ids"][:, [0, 1, 4, 5]])
        whole = np.maximum(one["time_ids"][:, 4] / one["time_ids"][:, 0], one["time_ids"][:, 5] / one["time_ids"][:, 1])
        for row, scale in enumerate(whole):  # nowhere beyond the picture
            most = one["time_ids"][row, :2] * scale - one["time_ids"][row, 4:]
            assert (other["time_ids"][row, 2:4] >= -1e-4).all() and (other["time_ids"][row, 2:4] <= most + 1e-3).all()
        moved += int((one["time_ids"] != other["time_ids"]).any(1).sum())
    assert moved > 10
    for one, other in zip(drawn[7:], again, strict=True):
        np.testing.assert_array_equal(one["pixels"], other["pixels"])
        np.testing.assert_array_equal(one["time_ids"], other["time_ids"])


STAMPS = pathlib.Path("/usr/share/tuxpaint/stamps")


@pytest.mark.skipif(not STAMPS.exists(), reason="tuxpaint-stamps-default is not installed")
def test_real_pictures_of_many_shapes_are_measured_sized_and_read() -> None:
    files = sorted(STAMPS.rglob("*.png"))[:200]

    class Stamps:
        label = "stamps"

        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, index: int) -> Picture:
            return Picture(files[index].read_bytes(), str(index), files[index].name)

        def fingerprint(self) -> dict[str, Any]:
            return {}

    stamps: Any = Stamps()
    sizes = measured(stamps)
    for index in range(0, len(files), 20):
        height, width, _ = stamps[index].pixels().shape
        assert sizes[index].tolist() == [width, height]
    buckets = buckets_of(stamps, resolution=64, step=8, unit=8, count=5)
    squares = suited(sizes, (1,), resolution=64, step=8)[0]
    assert 0 < cropped(buckets.assignment) < 0.5 * cropped(squares)
    for batch in take(stamps, 6, buckets=buckets, resolution=64):
        height, width = batch["pixels"].shape[1:3]
        assert Size(width, height) in buckets.sizes
        np.testing.assert_array_equal(batch["time_ids"][:, :2], sizes[batch["index"]][:, ::-1])


def losses(workdir: pathlib.Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_training_of_several_sizes_resumes_bit_for_bit(
    folder: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes: dict[str, Any] = {"data__buckets": ("16x16", "24x16"), "mesh__data": 4, "mesh__fsdp": 2}
    changes |= {
        "train__steps": 8,
        "train__global_batch_size": 8,
        "checkpoint__every_steps": 4,
        "optimizer__decay": "constant",  # the rate of a step does not depend on how many there will be
    }
    with tiny.quick_compilation(tmp_path), caplog.at_level("INFO", "offsetjax"):
        train(tiny.tiny_config(folder, **changes), tmp_path / "whole")
        assert "24x16: " in caplog.text
        assert re.search(r"the step for (16x16|24x16) was \w.* s \(2 of 2\)\n.*the steps for all 2 sizes", caplog.text)
        assert "the step was compiled" not in caplog.text  # in the midst
        train(tiny.tiny_config(folder, **{**changes, "train__steps": 4}), tmp_path / "parts")
        train(tiny.tiny_config(folder, **changes), tmp_path / "parts")
        with pytest.raises(UserError, match=r"data\.buckets = .* was begun with"):
            train(tiny.tiny_config(folder, **{**changes, "data__buckets": ("16x16",)}), tmp_path / "parts")
    found = losses(tmp_path / "whole")
    assert len(found) == 8 and np.isfinite(found).all()
    assert losses(tmp_path / "parts") == found
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:  # each step is logged, so that each mean is of one
        [of_size] = [line[name] for name in ("loss_16x16", "loss_24x16") if name in line]
        assert of_size == line["loss"] == line["loss_of_sizes"]
    assert {name for line in lines for name in line if name.startswith("loss_")} == {
        *("loss_16x16", "loss_24x16", "loss_of_sizes")
    }


@pytest.mark.parametrize("equal_tokens", [0, 2])
def test_the_parts_of_a_batch_may_have_sizes_of_their_own(source: Source, equal_tokens: int) -> None:
    """Part j of k of batch n is number k n + j of the plan, so that each example is seen once an epoch all the same."""
    buckets = buckets_of(source, batch_size=2, equal_tokens=equal_tokens)
    stream = make_stream(
        source,
        seed=3,
        global_batch_size=6,
        resolution=16,
        random_flip=True,
        buckets=buckets,
        tokenize=lambda caption: ({"text": np.array([int(caption)])}, 1, 1),
    )
    mixed = dataclasses.replace(stream, parts=3)
    for number in range(9):
        parts = range(3 * number, 3 * number + 3)
        assert mixed.sizes_of(number) == tuple(buckets.sizes[buckets.plan.size_of(part)] for part in parts)
        assert mixed.examples_of(number) == [each for part in parts for each in stream.examples_of(part)]
        assert mixed.examples_before(number) == stream.examples_before(3 * number)
        counts = [mixed.batch_sizes[size] for size in mixed.sizes_of(number)]
        assert sum(counts) == len(mixed.examples_of(number))
    assert any(len(set(mixed.sizes_of(number))) > 1 for number in range(9))
    with contextlib.closing(mixed.iterator(4)) as batches:  # as a run resumes at step 4
        read = [next(batches) for _ in range(3)]
    assert [each for part in read for each in part["index"].tolist()] == mixed.examples_of(4)
    assert [part["pixels"].shape[2:0:-1] for part in read] == list(mixed.sizes_of(4))
    epochs = 4
    seen = Counter(each for part in range(buckets.plan.batches_before(epochs)) for each in stream.examples_of(part))
    assert set(seen.values()) <= {epochs - 1, epochs} and len(seen) == buckets.assignment.counts.sum()
    assert mixed.fingerprint() == {**stream.fingerprint(), "parts": 3}
    on = mixed.going_on_after(mixed.examples_before(5) - 1, number=2)
    assert on.shift == 3 and on.examples_of(2) == mixed.examples_of(5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train__accumulate_steps": 2}, "data.mixed_sizes cannot apply without data.buckets"),
        ({"data__bucket_count": 3}, "data.mixed_sizes cannot apply with train.accumulate_steps = 1"),
    ],
)
def test_parts_of_different_sizes_need_parts_and_sizes(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        validate(tiny.tiny_config("", data__mixed_sizes=True, **changes))
