"""A cache of latents is read as its pictures are: the same order, the same flips; and each is refused for the other."""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest
from etils import epath

from offsetjax.config.schema import default_config
from offsetjax.data.cache import Cache, Shard, begin, finish, is_finished, missing_shards, read_cache
from offsetjax.data.inspect import inspect
from offsetjax.data.source import Source, captions, open_source
from offsetjax.data.stream import check_fingerprint, make_stream
from offsetjax.errors import StorageError, UserError
from tests.data.grey import grey_pictures

COUNT, SIDE = 23, 16
CACHE = Cache(
    encoder="0123456789abcdef",
    scaling_factor=0.5,
    latent_mean=(),
    latent_std=(),
    latent_shape=(4, 2, 2),
    resolution=SIDE,
    random_flip=True,
    source="some/pictures",
    num_examples={"train": COUNT},
    num_bytes={"train": 1000},
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return grey_pictures(tmp_path_factory.mktemp("data"), COUNT, SIDE)


def record(index: int) -> dict[str, Any]:
    """The mean is the number of the picture, and the log-variance that of the view: 0, or 1 for the mirror image."""
    moments = np.zeros((2, 2, 4, 2, 2), np.float16)
    moments[:, 0], moments[1, 1] = index, 1
    about = {"time_ids": np.full(6, index, np.float32), "brightness": np.float32(index / COUNT)}
    return {"moments": moments, **about, "caption": str(index), "name": f"{index:02}.png"}


def write(shard: Shard) -> None:
    shard.write(map(record, range(shard.first, shard.last)), CACHE)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("cache") / "of latents"
    begin(out, CACHE)
    for shard in missing_shards(out, CACHE, shard_size=10):
        write(shard)
    finish(out, CACHE, shard_size=10)
    return out


def take(source: Source, count: int, **changes: Any) -> list[dict[str, np.ndarray]]:
    options = {"seed": 3, "global_batch_size": 8, "resolution": SIDE, "random_flip": True}
    tokenize = lambda caption: ({"text": np.array([int(caption)])}, 1, 1)  # noqa: E731
    with contextlib.closing(make_stream(source, tokenize=tokenize, **(options | changes)).iterator()) as batches:
        return [next(batches) for _ in range(count)]


@pytest.mark.parametrize(
    ("split", "changes"),
    [
        ("train", {}),
        ("train[:15]", {"seed": 4, "rows": (2, 3, 6)}),
        ("train[50%:]", {"num_workers": 1}),
        ("train[5:10]+train[20:]", {"random_flip": False}),
    ],
)
def test_examples_come_in_the_order_and_with_the_flips_of_the_pictures(
    pictures: pathlib.Path, cached: pathlib.Path, split: str, changes: dict[str, Any]
) -> None:
    seen = take(open_source(pictures, split), 6, **changes)
    read = take(open_source(cached, split, cached_latents=True), 6, **changes)
    for one, other in zip(seen, read, strict=True):
        for name in ("index", "is_truncated"):
            np.testing.assert_array_equal(one[name], other[name])
        np.testing.assert_array_equal(one["input_ids"]["text"], other["input_ids"]["text"])
        numbers, is_flipped = one["input_ids"]["text"][:, 0], one["pixels"][:, 0, 0, 0] == 0
        moments = other["moments"]
        assert moments.dtype == np.float16 and moments.shape == (len(numbers), 2, 4, 2, 2)
        np.testing.assert_array_equal(moments[:, 0], np.broadcast_to(numbers[:, None, None, None], moments[:, 0].shape))
        np.testing.assert_array_equal(moments[:, 1].mean((1, 2, 3)), is_flipped)
        np.testing.assert_array_equal(other["time_ids"][:, 0], numbers)
        assert set(other) == {*one, "moments"} - {"pixels"}


def test_a_cache_says_what_it_was_made_of_and_has_the_captions(cached: pathlib.Path) -> None:
    source = open_source(cached, cached_latents=True)
    assert source.cache is not None and source.cache.to_json() == CACHE.to_json()
    assert captions(source) == [str(number) for number in range(COUNT)]
    assert len({file for file, _, _ in source.rows.ranges}) == 3
    first, second, third = (open_source(cached, split, True) for split in ("train[:50%]", "train[50%:]", "train[40%:]"))
    assert not first.shares_records(second) and first.shares_records(third)


def test_what_was_interrupted_goes_on_with_the_shards_that_are_missing(
    cached: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out = tmp_path / "cache"
    assert not is_finished(out, CACHE)
    begin(out, CACHE)
    first, second, third = missing_shards(out, CACHE, shard_size=10)
    write(second)

    def broken() -> Any:
        yield record(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.write(broken(), CACHE)
    moved = dataclasses.replace(CACHE, source="other/place")
    assert not is_finished(out, moved)
    begin(out, moved)
    assert missing_shards(out, CACHE, shard_size=10) == [first, third]
    with pytest.raises(
        UserError, match="has an unfinished cache of latents; continue it with the same `offsetjax data"
    ):
        open_source(out, cached_latents=True)
    with pytest.raises(UserError, match=r"has an unfinished cache with resolution = 16, but .* give 32; give another"):
        is_finished(out, dataclasses.replace(CACHE, resolution=32, random_flip=False))
    write(first)
    write(third)
    finish(out, CACHE, shard_size=10)
    assert {file.name: file.read_bytes() for file in out.rglob("*.*") if file.is_file()} == {
        file.name: file.read_bytes() for file in cached.rglob("*.*") if file.is_file()
    }
    assert is_finished(out, moved) and not missing_shards(out, moved, shard_size=10)
    with pytest.raises(
        UserError, match=r"has a finished cache with encoder = 0123456789abcdef, but .* give 0; give another"
    ):
        is_finished(out, dataclasses.replace(CACHE, encoder="0"))
    with pytest.raises(UserError, match="already exists; give another folder for the cache"):
        is_finished(tmp_path, CACHE)


def test_what_was_interrupted_before_it_said_what_it_is_goes_on(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "cache" / "latents" / "1.0.0"
    for made in (tmp_path / "cache", folder.parent, folder):
        made.mkdir()
        assert not is_finished(tmp_path / "cache", CACHE)
    (folder / ".latents.json.unfinished").write_text("{")
    assert not is_finished(tmp_path / "cache", CACHE)
    for other in (folder / "picture.png", tmp_path / "cache" / "notes.txt"):
        other.write_text("")
        with pytest.raises(UserError, match="already exists"):
            is_finished(tmp_path / "cache", CACHE)
        other.unlink()
    begin(tmp_path / "cache", CACHE)
    assert [file.name for file in folder.iterdir()] == ["latents.json"]


def test_a_shard_that_fails_leaves_nothing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(tmp_path / "cache", CACHE)
    before = sorted(tmp_path.rglob("*"))

    def fill_disk(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    shard = missing_shards(tmp_path / "cache", CACHE, shard_size=10)[0]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fill_disk)
        with pytest.raises(StorageError, match="No space left on device"):
            write(shard)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_split_is_read_alike_from_a_cache_with_more_splits(cached: pathlib.Path) -> None:
    source = open_source(cached, "train[:50%]", cached_latents=True)
    options: dict[str, Any] = {"seed": 3, "global_batch_size": 8, "resolution": SIDE, "random_flip": True}

    def fingerprint(split: str, **num_bytes: int) -> dict[str, Any]:
        of_pictures = dataclasses.replace(CACHE, num_bytes=num_bytes)
        changed = dataclasses.replace(source, rows=dataclasses.replace(source.rows, split=split), cache=of_pictures)
        stream = make_stream(changed, tokenize=lambda caption: ({}, 1, 1), **options)
        return json.loads(json.dumps(stream.fingerprint()))

    alone = fingerprint("train[:50%]", train=1000)
    assert alone["bytes_of_pictures"] == {"train": 1000}
    check_fingerprint(alone, fingerprint("train[:50%]", test=7, train=1000))
    for split in ("train[:50%]+test", "all"):
        assert fingerprint(split, test=7, train=1000)["bytes_of_pictures"] == {"train": 1000, "test": 7}
    with pytest.raises(UserError, match="bytes_of_pictures is"):
        check_fingerprint(alone, fingerprint("train[:50%]", test=7, train=1001))


@pytest.mark.parametrize("split", ["train[:1shard]", "train[5:]+train[1shard]"])
def test_latents_are_not_cut_by_shards(pictures: pathlib.Path, cached: pathlib.Path, split: str) -> None:
    with pytest.raises(
        UserError, match=r"is cut by shards, which have other records .*; cut it by percents"
    ) as refused:
        open_source(cached, split, cached_latents=True)
    assert "\n" not in str(refused.value)
    open_source(pictures, "train[:1shard]")


def test_latents_and_pictures_are_not_taken_for_each_other(pictures: pathlib.Path, cached: pathlib.Path) -> None:
    latents = r"has the latents of pictures, not the pictures; .*data\.cached_latents=True, or give some/pictures"
    with pytest.raises(UserError, match=latents):
        open_source(cached)
    with pytest.raises(UserError, match=latents):
        inspect(cached)
    with pytest.raises(UserError, match=r"has pictures, not their latents; .*`offsetjax data encode`"):
        open_source(pictures, cached_latents=True)


def test_a_cache_without_latents_is_told_what_it_lacks(cached: pathlib.Path, tmp_path: pathlib.Path) -> None:
    copied = shutil.copytree(cached, tmp_path / "copy")
    [features] = copied.rglob("features.json")
    features.write_text(features.read_text().replace('"moments"', '"means"'))
    with pytest.raises(UserError, match="has no feature 'moments'; it must have moments and caption"):
        open_source(copied, cached_latents=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": 32}, "has latents of pictures of 32 px, but data.resolution = 16; set it to 32"),
        ({"random_flip": False}, "has no mirror images; set data.random_flip=False"),
        ({"encoder": "fedcba9876543210"}, "has latents of another autoencoder, with the checksum fedcba9876543210"),
    ],
)
def test_latents_of_another_training_are_refused(change: dict[str, Any], message: str) -> None:
    data = default_config().data
    data.resolution = SIDE
    CACHE.check("here", data, CACHE.encoder)
    with pytest.raises(UserError, match=f"data: here {message}") as refused:
        dataclasses.replace(CACHE, **change).check("here", data, CACHE.encoder)
    assert "\n" not in str(refused.value)
    data.random_flip = False
    dataclasses.replace(CACHE, random_flip=False).check("here", data, CACHE.encoder)


def test_a_damaged_description_is_refused(tmp_path: pathlib.Path) -> None:
    for text in ("{", '{"encoder": "0"}', "[]"):
        (tmp_path / "latents.json").write_text(text)
        with pytest.raises(UserError, match=r"latents\.json is damaged"):
            read_cache(epath.Path(tmp_path))
