"""Several data sets in one training come with the shares, the repeats and the captions that are said of each."""

import contextlib
import zlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from offsetjax.config import override, validate
from offsetjax.config.schema import default_config
from offsetjax.data.buckets import Size
from offsetjax.data.mixed import Mixed
from offsetjax.data.record import Picture
from offsetjax.data.sizes import measured
from offsetjax.data.source import SOURCES, Source, check_crops, describe, open_data
from offsetjax.data.stream import make_stream
from offsetjax.errors import UserError
from offsetjax.prepare.latents import encode_data
from offsetjax.training.evaluators import validation_batching
from offsetjax.training.streams import batching_of


@dataclass(frozen=True)
class Counted:
    """As many black pictures as the path says, `a/5`: as wide as their number and two."""

    path: str
    split: str

    @property
    def label(self) -> str:
        return f"{self.path} ({self.split})"

    def __len__(self) -> int:
        return int(self.path.partition("/")[2])

    def __getitem__(self, index: int) -> Picture:
        name = f"{self.path[0]} {index}"
        return Picture(np.zeros((4, index + 2, 3), np.uint8), name, name)

    def sizes(self) -> np.ndarray:
        return np.array([[index + 2, 4] for index in range(len(self))], np.int32)

    def fingerprint(self) -> dict[str, Any]:
        return {"path": self.path}

    def shares_records(self, other: Source) -> bool:
        return isinstance(other, Counted) and self == other


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOURCES._registered, "counted", Counted)


def config_of(*texts: str, **changes: str) -> ConfigDict:
    config = default_config()
    override(config, "data.source", "counted")
    override(config, "data.mix", repr(texts))
    for name, text in changes.items():
        override(config, name.replace("__", "."), text)
    return config


def opened(*texts: str) -> Mixed:
    config = config_of(*texts)
    validate(config)
    source = open_data(config.data)
    assert isinstance(source, Mixed)
    return source


def captions_of(source: Mixed) -> Counter[str]:
    return Counter(source[index].caption for index in range(len(source)))


def test_without_weights_each_picture_comes_as_often_as_it_is_repeated() -> None:
    source = opened("data.path=a/3", "data.path=b/2 data.repeats=4 data.split=test")
    assert captions_of(source) == {"a 0": 1, "a 1": 1, "a 2": 1, "b 0": 4, "b 1": 4}
    assert source.label == "a mix of a/3 (train), b/2 (test)"
    assert str(source) == (
        "a mix, 11 examples an epoch: a/3 (train) (3 pictures, 27.3% of the examples); "
        "b/2 (test) (2 pictures, 72.7% of the examples)"
    )
    assert describe(source, 10) == "record 1 (b 1) of b/2 (test)"
    assert open_data(config_of("data.path=a/3", "data.path=b/2").data, "test").sources[0].split == "test"


@pytest.mark.parametrize(
    ("lengths", "weights"), [((10, 3), (3, 1)), ((1000, 10, 7), (0.5, 0.25, 0.25)), ((5, 5), (1, 9)), ((7, 1), (1, 1))]
)
def test_weights_are_shares_of_the_examples_and_every_picture_comes(
    lengths: tuple[int, ...], weights: tuple[float, ...]
) -> None:
    pairs = enumerate(zip(lengths, weights, strict=True))
    source = opened(*(f"data.path={'abc'[each]}/{length} data.weight={weight}" for each, (length, weight) in pairs))
    counts = captions_of(source)
    assert len(counts) == sum(lengths)
    for name, length, weight in zip("abc", lengths, weights, strict=False):
        own = [count for caption, count in counts.items() if caption[0] == name]
        assert len(own) == length and max(own) - min(own) <= 1
        assert abs(sum(own) - len(source) * weight / sum(weights)) <= 1
    assert len(source) <= 1 + max(length / weight for length, weight in zip(lengths, weights, strict=True)) * sum(
        weights
    )


def test_sizes_are_those_of_the_examples_and_records_are_shared_by_any() -> None:
    source = opened("data.path=a/3 data.weight=1", "data.path=b/5 data.weight=2")
    sizes = measured(source)
    assert [Size(*size) for size in sizes.tolist()] == [source[index].size() for index in range(len(source))]
    assert source.shares_records(opened("data.path=c/3", "data.path=b/5"))
    assert source.shares_records(Counted("b/5", "train")) and not source.shares_records(Counted("b/5", "test"))
    check_crops(source)
    other = opened("data.path=a/3 data.weight=1", "data.path=b/5 data.weight=1")
    assert source.fingerprint() != other.fingerprint()


def test_each_has_captions_of_its_own_and_the_same_after_a_resume() -> None:
    texts = ("data.path=a/4 captions.prefix='art of '", "data.path=b/4 captions.trigger=sks captions.suffix=''")
    config = config_of(*texts, captions__suffix=" here")
    seen: list[str] = []

    def tokenize(caption: str) -> tuple[dict[str, np.ndarray], int, int]:
        seen.append(caption)
        return {"text": np.array([zlib.crc32(caption.encode()) & 0x7FFFFFFF])}, 1, 1

    def take(captions: Any, start: int, count: int) -> np.ndarray:
        options = {"global_batch_size": 4, "resolution": 8, "random_flip": False, "tokenize": tokenize}
        batches = make_stream(open_data(config.data), seed=1, captions=captions, **options).iterator(start)
        with contextlib.closing(batches):
            return np.concatenate([next(batches)["input_ids"]["text"][:, 0] for _ in range(count)])

    rules = batching_of(config).captions
    whole = take(rules, 0, 2)
    expected = {f"art of a {number} here" for number in range(4)} | {f"sks, b {number}" for number in range(4)}
    assert set(seen[:8]) == expected
    np.testing.assert_array_equal(take(rules, 1, 1), whole[4:])
    override(config, "captions.tag_dropout", "1.0")
    seen.clear()
    take(validation_batching(batching_of(config), 1).captions, 0, 2)
    assert set(seen[:8]) == expected


@pytest.mark.parametrize(
    ("texts", "changes", "message"),
    [
        (("data.split=test",), {}, r"data\.mix, data set 1: it has no data\.path; write it such as 'data\.path=photos"),
        (("a/3",), {}, r"data\.mix, data set 1: 'a/3' sets no field; write fields such as"),
        (("data.path=a/3 data.wieght=1",), {}, r"unknown key 'data\.wieght'.*data\.weight"),
        (
            ("data.path=a/3 data.resolution=64",),
            {},
            r"data\.resolution is of the whole mix; of one data set are data\.path",
        ),
        (("data.path=a/3 data.weight=-1",), {}, r"data\.mix, data set 1: .*data\.weight = -1\.0 must be"),
        (("data.path=a/3 data.path=b/3",), {}, "data.path is given twice"),
        (("data.path=a/3 data.weight=1", "data.path=b/3"), {}, r"data set 2: it has no data\.weight, but others have"),
        (("data.path=a/3 data.weight=1 data.repeats=2",), {}, r"data set 1: data\.weight and data\.repeats both say"),
        (("data.path=s3://b/x",), {}, r"data set 1: data\.path = 's3://b/x'"),
        (("data.path=a/3 captions.keep_tags=1",), {}, r"data set 1: captions\.keep_tags cannot apply without"),
        (("data.path=a/3",), {"data__path": "b"}, r"data\.path cannot apply with data\.mix"),
        (("data.path=a/3",), {"data__cached_latents": "True"}, r"data\.mix cannot apply with data\.cached_latents"),
        ((), {"data__weight": "2"}, r"data\.weight is of one data set among several; write it in a text of data\.mix"),
        ((), {"data__repeats": "2"}, r"data\.repeats is of one data set among several"),
    ],
)
def test_mixes_that_are_none_are_refused(texts: tuple[str, ...], changes: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        validate(config_of(*texts, **changes))
    assert "\n" not in str(raised.value)


def test_a_mix_that_cannot_be_opened_says_which_of_it() -> None:
    with pytest.raises(UserError, match=r"b/0 \(train\) is empty \(data\.mix, data set 2\)"):
        opened("data.path=a/1", "data.path=b/0")
    with pytest.raises(UserError, match=r"would be longer than 2147483647 examples; bring data\.weight"):
        opened("data.path=a/9000000 data.weight=1", "data.path=b/1 data.weight=1000")
    with pytest.raises(UserError, match=r"makes the latents of one data set; leave out data\.mix"):
        encode_data(config_of("data.path=a/1"), "/nowhere")
