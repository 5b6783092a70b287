"""The batches are a function of the seed and of their number alone, and every example is seen once an epoch."""

import contextlib
import dataclasses
import errno
import io
import json
import multiprocessing
import pathlib
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from offsetjax.data.record import Picture
from offsetjax.data.source import Features, Source, open_source
from offsetjax.data.stream import check_fingerprint, check_replaced, make_stream
from offsetjax.errors import TransientError, UserError
from offsetjax.storage import retry
from tests.data.grey import grey_pictures

COUNT, SIDE = 23, 16
Batch = dict[str, Any]


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return grey_pictures(tmp_path_factory.mktemp("data"), COUNT, SIDE)


@pytest.fixture
def source(data_set: pathlib.Path) -> Source:
    return open_source(data_set, "train")


def tokenize(caption: str) -> tuple[dict[str, np.ndarray], int, int]:
    """As two text encoders read it, of three tokens and of two; captions from 20 on would have four."""
    return {"long": np.array([7, int(caption), 9]), "short": np.array([int(caption), 0])}, 3 + (int(caption) >= 20), 3


def take(source: Source, count: int, start: int = 0, **changes: Any) -> list[Batch]:
    options = {"seed": 3, "global_batch_size": 8, "resolution": SIDE, "random_flip": True, "tokenize": tokenize}
    batches = make_stream(source, **(options | changes)).iterator(start)
    with contextlib.closing(batches):
        return [next(batches) for _ in range(count)]


def assert_same(actual: list[Batch], expected: list[Batch]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.keys() == other.keys()
        assert jax.tree.structure(one) == jax.tree.structure(other)
        for array, other_array in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            assert array.dtype == other_array.dtype
            np.testing.assert_array_equal(array, other_array)


def test_a_batch_holds_the_pictures_and_captions_of_its_indices(source: Source) -> None:
    for batch in take(source, 6, random_flip=False):
        assert jax.tree.map(lambda array: (array.shape, array.dtype.name), batch) == {
            "pixels": ((8, SIDE, SIDE, 3), "uint8"),
            "input_ids": {"long": ((8, 3), "int32"), "short": ((8, 2), "int32")},
            "time_ids": ((8, 6), "float32"),
            "is_truncated": ((8,), "bool"),
            "is_replaced": ((8,), "bool"),
            "index": ((8,), "int64"),
        }
        np.testing.assert_array_equal(batch["input_ids"]["long"], [[7, index, 9] for index in batch["index"]])
        np.testing.assert_array_equal(batch["input_ids"]["short"], [[index, 0] for index in batch["index"]])
        np.testing.assert_array_equal(batch["time_ids"], [[SIDE, SIDE, 0, 0, SIDE, SIDE]] * 8)
        np.testing.assert_array_equal(batch["pixels"][:, 0, 0, 0], 10 * batch["index"] + 10)
        assert (batch["pixels"][:, :, SIDE // 2 :] == 0).all()


def test_pictures_are_brought_to_the_resolution(source: Source) -> None:
    for resolution in (8, 40):
        assert take(source, 1, resolution=resolution)[0]["pixels"].shape == (8, resolution, resolution, 3)


def test_captions_that_are_cut_are_marked(source: Source) -> None:
    batches = take(source, COUNT)
    for batch in batches:
        np.testing.assert_array_equal(batch["is_truncated"], batch["index"] >= 20)
    assert any(batch["is_truncated"].any() for batch in batches)


def test_refused_captions_are_named_and_short_ones_pass(source: Source, data_set: pathlib.Path) -> None:
    long = r"the caption of record (2\d) \(\1\.png\) of .*set.* \(train\) has 4 tokens, but the text encoders read 3; "
    for num_workers in (0, 1):
        with pytest.raises(UserError, match=long + r"shorten it, or set encode\.long_captions='truncate'"):
            take(source, COUNT, long_captions="refuse", num_workers=num_workers)
    short = open_source(data_set, "train[:20]")
    assert_same(take(short, 5, long_captions="refuse"), take(short, 5))


def test_every_example_is_seen_once_an_epoch_in_a_new_order(source: Source) -> None:
    seen = np.concatenate([batch["index"] for batch in take(source, COUNT)])  # eight epochs
    epochs = seen.reshape(8, COUNT)
    for epoch in epochs:
        assert sorted(epoch) == list(range(COUNT))
    assert len({tuple(epoch) for epoch in epochs}) == 8
    assert tuple(range(COUNT)) not in {tuple(epoch) for epoch in epochs}


def test_the_examples_of_a_batch_are_known_without_reading_it(source: Source) -> None:
    stream = make_stream(
        source, seed=3, global_batch_size=8, resolution=SIDE, random_flip=True, tokenize=tokenize, rows=(1, 5)
    )
    batches = take(source, 12, seed=3)
    assert [stream.examples_of(number) for number in range(12)] == [batch["index"].tolist() for batch in batches]
    assert len(stream.examples_of(10**9)) == 8


def test_half_of_the_pictures_are_flipped_anew_each_epoch(source: Source) -> None:
    flipped: dict[int, list[bool]] = {index: [] for index in range(COUNT)}
    for batch in take(source, 5 * COUNT):  # forty epochs
        is_flipped = batch["pixels"][:, 0, 0, 0] == 0
        np.testing.assert_array_equal(batch["pixels"][is_flipped, 0, -1, 0], 10 * batch["index"][is_flipped] + 10)
        for index, flip in zip(batch["index"], is_flipped, strict=True):
            flipped[int(index)].append(bool(flip))
    flips = np.array(list(flipped.values()))
    assert flips.shape == (COUNT, 40)
    assert abs(flips.mean() - 0.5) < 4 * 0.5 / np.sqrt(flips.size)
    assert all(5 <= count <= 35 for count in flips.sum(axis=1)), "an example is flipped always or never"
    assert abs(np.corrcoef(flips[:, :-1].ravel(), flips[:, 1:].ravel())[0, 1]) < 0.15


def test_the_seed_decides(source: Source) -> None:
    assert_same(take(source, 3), take(source, 3))
    one, other = (np.concatenate([batch["index"] for batch in take(source, 3, seed=seed)]) for seed in (3, 4))
    assert (one != other).any()


def test_workers_make_the_same_batches_as_threads(source: Source) -> None:
    expected = take(source, 12)
    assert_same(take(source, 12, num_workers=2), expected)
    assert_same(take(source, 5, start=7, num_workers=2), expected[7:])
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("start", [1, 2, 3, 11, 22])
def test_resuming_at_any_batch_gives_the_batches_that_were_to_come(source: Source, start: int) -> None:
    assert_same(take(source, 4, start=start), take(source, start + 4)[start:])


def test_resuming_is_immediate_however_far(source: Source) -> None:
    began = time.monotonic()
    assert take(source, 1, start=10**9)[0]["index"].shape == (8,)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("rows", [(0, 1, 2, 3), (2, 3, 6, 7), (5,)])
def test_a_process_reads_its_rows_of_each_batch(source: Source, rows: tuple[int, ...]) -> None:
    mine = [jax.tree.map(lambda field: field[list(rows)], batch) for batch in take(source, 9)]
    assert_same(take(source, 9, rows=rows), mine)


def test_a_data_set_smaller_than_a_batch_repeats_in_it(source: Source) -> None:
    (batch,) = take(source, 1, global_batch_size=64)
    counts = Counter(batch["index"].tolist())
    assert len(counts) == COUNT and set(counts.values()) <= {2, 3}


def test_a_split_of_one_example_is_enough(data_set: pathlib.Path) -> None:
    one = open_source(data_set, "train[:1]")
    assert len(one) == 1
    assert take(one, 2, global_batch_size=4)[1]["index"].tolist() == [0, 0, 0, 0]


def test_closing_leaves_no_thread_and_no_process(source: Source) -> None:
    take(source, 1)  # what the libraries start once and keep
    before = set(threading.enumerate())
    for num_workers in (0, 1):
        take(source, 2, num_workers=num_workers)
    unread = make_stream(
        source, seed=0, global_batch_size=4, resolution=8, random_flip=False, tokenize=tokenize
    ).iterator(0)
    unread.close()
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)  # a thread may be at its last picture
    assert not set(threading.enumerate()) - before
    assert not multiprocessing.active_children()


@pytest.fixture
def copied(data_set: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    shutil.copytree(data_set, tmp_path / "set")
    return tmp_path / "set"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_record_that_is_no_picture_is_named(tmp_path: pathlib.Path, num_workers: int) -> None:
    features = {"image": tfds.features.Image(), "caption": tfds.features.Text()}
    records = [{"image": b"no picture", "caption": "1"}]
    write_split(tmp_path / "set", features, records)
    with pytest.raises(UserError, match=r"record 0 .*set.* \(train\) is no picture: not a picture"):
        take(open_source(tmp_path / "set"), 1, num_workers=num_workers)


def test_a_damaged_file_is_named(copied: pathlib.Path) -> None:
    (file,) = copied.rglob("*.array_record*")
    data = bytearray(file.read_bytes())
    first_chunk = next(place for place in range(len(data) - 4) if data[place : place + 4] == b"IDAT")
    data[first_chunk + 8] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"record \d+ of .*set.* cannot be read"):
        take(open_source(copied), 4)


NOISE = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def encoded(array: np.ndarray, kind: str, mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).convert(mode).save(buffer, kind)
    return buffer.getvalue()


# Some can be shown, such as CMYK and 16 bits, and are; the others are left out.
ODD = {
    "corrupt": bytes(99) + encoded(NOISE, "PNG")[99:],
    "truncated": encoded(NOISE, "PNG")[:300],
    "empty": b"",
    "text": b"<html>not found</html>",
    "32 bits": encoded(np.ones((4, 4), np.float32), "TIFF"),
    "CMYK": encoded(NOISE, "JPEG", "CMYK"),
    "16 bits": encoded(NOISE[..., 0].astype(np.uint16) * 257, "PNG"),
}
BAD = ("corrupt", "truncated", "empty", "text", "32 bits")


def bad_records(source: Source) -> list[int]:
    """Their numbers; TFDS writes records in an order of its own."""
    files = {ODD[name] for name in BAD}
    return [index for index in range(len(source)) if source[index].image in files]  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def bad_set(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """100 pictures, written around our builder, which would have left out the five that cannot be shown."""
    good = [encoded(np.full((SIDE, SIDE, 3), each, np.uint8), "PNG") for each in range(100)]
    pictures = good[: -len(ODD)] + list(ODD.values())
    features = {"image": tfds.features.Image(), "caption": tfds.features.Text()}
    folder = tmp_path_factory.mktemp("bad") / "set"
    write_split(folder, features, [{"image": data, "caption": str(each % 20)} for each, data in enumerate(pictures)])
    return folder


def test_the_next_good_record_of_the_order_takes_a_bad_ones_place(
    bad_set: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_source(bad_set)
    bad = bad_records(source)
    assert len(bad) == len(BAD)
    order = np.concatenate([each["index"] for each in take(Readable(len(source)), 27)])  # where all can be read
    batches = take(source, 25, max_bad_fraction=0.05)
    expected = [next(int(other) for other in order[place:] if other not in bad) for place in range(200)]
    found = np.concatenate([each["index"] for each in batches])
    np.testing.assert_array_equal(found, expected)
    replaced = np.concatenate([each["is_replaced"] for each in batches])
    np.testing.assert_array_equal(replaced, np.isin(order[:200], bad))
    assert replaced.sum() == 2 * len(BAD), "two epochs"
    lines = [record.getMessage() for record in caplog.records if "is no picture" in record.getMessage()]
    assert sorted(int(re.findall(r"record (\d+) ", line)[0]) for line in lines) == bad, "once each"
    assert all(line.endswith("; another takes its place") for line in lines)


def test_what_is_left_out_is_the_same_after_a_resume_and_on_every_host(bad_set: pathlib.Path) -> None:
    source = open_source(bad_set)
    whole = take(source, 10, max_bad_fraction=0.05)
    assert_same(take(source, 6, start=4, max_bad_fraction=0.05), whole[4:])
    assert_same(take(source, 2, max_bad_fraction=0.05, num_workers=1), whole[:2])
    for rows in ([0, 1, 4, 5], [2, 3, 6, 7]):
        mine = take(source, 10, max_bad_fraction=0.05, rows=rows)
        assert_same(mine, [jax.tree.map(lambda field, rows=rows: field[rows], each) for each in whole])


def test_a_limit_of_bad_records(bad_set: pathlib.Path) -> None:
    source = open_source(bad_set)
    with pytest.raises(
        UserError, match=r"record \d+ .*is no picture.*; build the data set again with `offsetjax data build`$"
    ):
        take(source, 13)
    stream = make_stream(
        source,
        seed=3,
        global_batch_size=8,
        resolution=SIDE,
        random_flip=False,
        tokenize=tokenize,
        max_bad_fraction=0.05,
    )
    for replaced, seen in ((5, 8), (5, 100), (10, 101), (10, 200), (0, 0)):
        check_replaced(stream, replaced, seen)
    for replaced, seen in ((6, 8), (6, 100), (11, 200)):
        with pytest.raises(UserError, match=rf"{replaced} records of .* in {seen} examples, more than data.max_bad_fr"):
            check_replaced(stream, replaced, seen)


def test_a_data_set_of_nothing_good_ends_in_a_line(tmp_path: pathlib.Path) -> None:
    features = {"image": tfds.features.Image(), "caption": tfds.features.Text()}
    write_split(tmp_path / "set", features, [{"image": b"", "caption": "1"}] * 3)
    with pytest.raises(
        UserError, match=r"record \d .* of .*: the file is empty.*\(and so are the 63 that follow it\)$"
    ):
        take(open_source(tmp_path / "set"), 1, max_bad_fraction=1.0)


def test_a_read_that_may_pass_is_tried_again_and_no_bad_record(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "WAITS", (0.0, 0.0))
    rows, tries = source.rows, []  # type: ignore[attr-defined]

    class Unsteady:
        def __getitem__(self, index: int) -> Any:
            tries.append(index)
            if len(tries) % 3:
                raise OSError(errno.EIO, "Input/output error")
            return rows.records[index]

    unsteady = dataclasses.replace(rows, records=Unsteady())
    assert unsteady[4]["caption"] == rows[4]["caption"] and len(tries) == 3
    monkeypatch.setattr(retry, "WAITS", ())
    with pytest.raises(TransientError, match=r"record 4 of .*tried 1 times"):
        unsteady[4]


class Readable:
    """As many records as a data set has, of which all can be read."""

    label = "readable"

    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Picture:
        return Picture(NOISE, "0")

    def fingerprint(self) -> dict[str, Any]:
        return {}

    def shares_records(self, other: Source) -> bool:
        return False


class Foreign(tfds.core.GeneratorBasedBuilder):
    """A TFDS data set that this project did not make."""

    VERSION = tfds.core.Version("2.0.0")
    code_path = None

    def __init__(self, features: dict[str, Any], records: list[dict[str, Any]], **kwargs: Any):
        self._features, self._records = features, records
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(self._features))

    def _split_generators(self, _: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate(self._records)


def write_split(folder: pathlib.Path, features: dict[str, Any], records: list[dict[str, Any]]) -> None:
    Foreign(features, records, data_dir=str(folder)).download_and_prepare(download_dir=str(folder.parent / "downloads"))


def test_other_tfds_data_sets_can_be_read(tmp_path: pathlib.Path, data_set: pathlib.Path) -> None:
    features = {
        "image": tfds.features.Image(),
        "caption": tfds.features.Text(),
        "label": tfds.features.ClassLabel(names=["x"]),
    }
    image = open_source(data_set)[4].image
    write_split(tmp_path / "a", features, [{"image": image, "caption": "4", "label": 0}])
    batch = take(open_source(tmp_path / "a"), 1, global_batch_size=1, random_flip=False)[0]
    assert batch["pixels"][0, 0, 0, 0] == 50 and batch["input_ids"]["long"].tolist() == [[7, 4, 9]]
    write_split(tmp_path / "b", {"image": tfds.features.Image()}, [{"image": image}])
    with pytest.raises(UserError, match="has no feature 'caption'"):
        open_source(tmp_path / "b")


@pytest.mark.parametrize(
    ("name", "feature", "value", "words"),
    [
        (
            "caption",
            tfds.features.Tensor(shape=(2,), dtype=np.float32),
            np.zeros(2, np.float32),
            r"Tensor\(.*, but it must be a Text, a Sequence of them or a ClassLabel",
        ),
        ("image", tfds.features.Text(), "a path", r"Text\(.*, but it must be an Image"),
    ],
)
def test_features_of_another_kind_are_not_trained_on(
    tmp_path: pathlib.Path, data_set: pathlib.Path, name: str, feature: Any, value: Any, words: str
) -> None:
    features = {"image": tfds.features.Image(), "caption": tfds.features.Text()}
    record = {"image": open_source(data_set)[4].image, "caption": "4"}
    write_split(tmp_path / "set", {**features, name: feature}, [{**record, name: value}])
    with pytest.raises(UserError, match=f"has the feature '{name}' as {words}; prepare the data with one") as refused:
        open_source(tmp_path / "set")
    assert "\n" not in str(refused.value)


def test_features_of_any_name_are_read_and_classes_by_a_template(
    tmp_path: pathlib.Path, data_set: pathlib.Path
) -> None:
    image = open_source(data_set)[4].image
    features = {
        "picture": tfds.features.Image(),
        "label": tfds.features.ClassLabel(names=["tabby_cat", "dog"]),
        "texts": tfds.features.Sequence(tfds.features.Text()),
        "about": tfds.features.FeaturesDict({"alt": tfds.features.Text()}),
        "told": tfds.features.Sequence({"by": tfds.features.Text(), "words": tfds.features.Text()}),
    }
    told = [{"by": "x", "words": "one"}, {"by": "y", "words": "two"}]
    record = {"picture": image, "texts": ["first", "second"], "about": {"alt": "within"}, "told": told}
    write_split(tmp_path / "set", features, [{**record, "label": label} for label in (1, 0, -1)])

    def opened(caption: str, template: str = "") -> Any:
        return open_source(tmp_path / "set", features=Features("picture", caption, template))

    assert [opened("label", "a photo of a {label}")[number].caption for number in (0, 1)] == [
        "a photo of a dog",
        "a photo of a tabby cat",
    ]
    with pytest.raises(UserError, match=r"record 2 of .* has no class: -1"):
        opened("label", "a {label}")[2]
    assert (opened("texts")[0].caption, opened("texts")[0].others) == ("first", ("second",))
    assert opened("about/alt", "art of {label}")[0].caption == "art of within"
    assert (opened("told/words")[0].caption, opened("told/words")[0].others) == ("one", ("two",))
    assert opened("texts")[0].image == image
    for caption, template, message in (
        ("label", "", r"'label' as classes, such as 'tabby_cat'; set data.label_template='a photo of a \{label\}'"),
        ("label", "a photo", "data.label_template = 'a photo' has no place for the label"),
        ("told", "", "but it must be a Text, a Sequence of them or a ClassLabel"),
        (
            "told/when",
            "",
            "has no feature 'told/when'; it must have picture and told/when, and has about .FeaturesDict., label",
        ),
    ):
        with pytest.raises(UserError, match=message) as refused:
            opened(caption, template)
        assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match=r"data\.caption_feature cannot apply with data\.cached_latents"):
        open_source(tmp_path / "set", cached_latents=True, features=Features(caption="texts"))


def test_a_string_that_is_not_called_text_is_one(tmp_path: pathlib.Path, data_set: pathlib.Path) -> None:
    features = {"image": tfds.features.Image(), "caption": tfds.features.Tensor(shape=(), dtype=np.str_)}
    write_split(tmp_path / "set", features, [{"image": open_source(data_set)[4].image, "caption": "4"}])
    assert open_source(tmp_path / "set")[0].caption == "4"


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("text", [None, "{}", "[1]", ""])
def test_a_damaged_description_is_told(
    tmp_path: pathlib.Path, data_set: pathlib.Path, file: str, text: str | None
) -> None:
    copied = shutil.copytree(data_set, tmp_path / "copy")
    [damaged] = copied.rglob(file)
    damaged.write_text(damaged.read_text()[:50] if text is None else text)
    with pytest.raises(UserError, match=r"cannot be opened: .*json is damaged: copy them again, or build") as refused:
        open_source(copied)
    assert "\n" not in str(refused.value)


def test_a_data_set_runs_no_code_of_its_own(
    tmp_path: pathlib.Path, data_set: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil.py").write_text("import pathlib\npathlib.Path('was_here').touch()\nclass X: ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for number, name in enumerate(("evil.X", "tensorflow_datasets.core.features.evil-X", "os.system", 3)):
        copied = shutil.copytree(data_set, tmp_path / f"copy{number}")
        [features] = copied.rglob("features.json")
        described = json.loads(features.read_text())
        described["featuresDict"]["features"]["name"]["pythonClassName"] = name
        features.write_text(json.dumps(described))
        with pytest.raises(UserError, match=r"asks for the class .*TFDS's own features are read") as refused:
            open_source(copied)
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "was_here").exists()


def position_picture(height: int, width: int, orientation: int) -> bytes:
    """Red is twice the column of a pixel and green twice its row, once the picture is turned as its EXIF says."""
    rows, columns = np.mgrid[:height, :width]
    image = Image.fromarray(np.stack([2 * columns, 2 * rows, 0 * rows], -1).astype(np.uint8))
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation  # 6: it was stored turned left
    image = image.transpose(Image.Transpose.ROTATE_90) if orientation == 6 else image
    image.save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


SIZES = ((32, 32), (64, 120), (120, 64), (101, 125), (126, 99), (20, 30), (31, 21), (35, 127), (60, 110))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_time_ids_say_what_was_cut_from_each_picture_also_of_flipped_ones(
    tmp_path: pathlib.Path, num_workers: int
) -> None:
    """The columns and rows that are left in the pixels tell where the crop began."""
    features = {"image": tfds.features.Image(), "caption": tfds.features.Text()}
    turned = [1] * (len(SIZES) - 2) + [6, 6]
    images = [position_picture(*size, orientation) for size, orientation in zip(SIZES, turned, strict=True)]
    records = [{"image": image, "caption": str(number)} for number, image in enumerate(images)]
    write_split(tmp_path / "set", features, records)
    seen = set()
    for batch in take(open_source(tmp_path / "set"), 16, resolution=32, num_workers=num_workers):
        numbers = batch["input_ids"]["short"][:, 0]  # TFDS shuffles such records when it writes them
        for number, pixels, time_ids in zip(numbers, batch["pixels"], batch["time_ids"], strict=True):
            height, width = SIZES[number]
            scale = 32 / min(height, width)
            columns, rows = pixels[16, :, 0] / 2, pixels[:, 16, 1] / 2
            is_flipped = bool(columns[-1] < columns[0])
            columns = width - 1 - columns if is_flipped else columns  # of the picture as it was cropped
            inner = np.arange(4, 28)  # the filter sees no further pixels at the edges
            top, left = (((places[inner] + 0.5) * scale - inner - 0.5).mean() for places in (rows, columns))
            np.testing.assert_array_equal(time_ids[[0, 1, 4, 5]], [height, width, 32, 32])
            np.testing.assert_allclose(time_ids[2:4], [top, left], atol=0.15)
            seen.add((int(number), is_flipped))
    assert len(seen) == 2 * len(SIZES), "each picture was seen as it is and mirrored"


def test_what_is_no_data_set_is_refused(copied: pathlib.Path, tmp_path: pathlib.Path) -> None:
    version = next(copied.glob("*/*"))
    for path in (copied, copied / "pictures", version):
        assert len(open_source(path)) == COUNT
    for path in (tmp_path / "nowhere", tmp_path, ""):
        with pytest.raises(UserError, match="holds no data set"):
            open_source(path)
    for split in ("test", "train[:0]", "train[", ""):
        with pytest.raises(UserError, match=r"has no split .* it has train|is empty"):
            open_source(copied, split)
    shutil.copytree(version, version.parent / "1.1.0")
    with pytest.raises(UserError, match=r"several data sets; give one of .*1\.0\.0.*1\.1\.0"):
        open_source(copied)


def test_the_fingerprint_survives_json_and_names_what_differs(source: Source, data_set: pathlib.Path) -> None:
    options = {"seed": 3, "global_batch_size": 8, "resolution": SIDE, "random_flip": True, "tokenize": tokenize}
    saved = json.loads(json.dumps(make_stream(source, **options).fingerprint()))
    same = make_stream(source, **options, num_workers=2, rows=range(4, 8))
    check_fingerprint(saved, same.fingerprint())
    for field, value in {"seed": 4, "global_batch_size": 16, "resolution": 8, "random_flip": False}.items():
        with pytest.raises(UserError, match=rf"data: {field} is {value}, but the checkpoint was written with"):
            check_fingerprint(saved, make_stream(source, **(options | {field: value})).fingerprint())
    with pytest.raises(UserError, match="num_examples is 20"):
        check_fingerprint(saved, make_stream(open_source(data_set, "train[:20]"), **options).fingerprint())
