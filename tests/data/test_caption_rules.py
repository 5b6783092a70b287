"""Captions are shuffled, dropped and drawn by (seed, place) alone, at the rates and weights that are asked for."""

import contextlib
import zlib
from collections import Counter
from typing import Any

import numpy as np
import pytest

from offsetjax.config import override, validate
from offsetjax.config.schema import default_config
from offsetjax.data.caption_rules import CaptionRules
from offsetjax.data.record import Picture
from offsetjax.data.source import Source
from offsetjax.data.stream import make_stream
from offsetjax.errors import UserError
from offsetjax.training.evaluators import validation_batching
from offsetjax.training.streams import batching_of

TAGS = "cat, tail, paw, ear, nose, whisker"
MANY = 2000


def shown(rules: CaptionRules, *captions: str, count: int = MANY, seed: int = 1) -> list[str]:
    return [rules.caption(captions, seed, place) for place in range(count)]


def test_by_default_the_first_caption_is_left_as_it_is() -> None:
    assert set(shown(CaptionRules(), " a,b ,, c", "other", count=5)) == {" a,b ,, c"}


@pytest.mark.parametrize(
    ("rules", "caption", "expected"),
    [
        (CaptionRules(prefix="art of ", suffix=", 4k"), "a cat", "art of a cat, 4k"),
        (CaptionRules(prefix="x", templates=("a {caption} of {caption}",)), "cat", "xa cat of cat"),
        (CaptionRules(trigger="sks"), "cat,  tail ,", "sks, cat, tail"),
        (CaptionRules(trigger="sks"), "cat, sks, tail", "sks, cat, tail"),
        (CaptionRules(trigger="sks", separator=" | "), "cat | tail, long", "sks | cat | tail, long"),
        (CaptionRules(prefix="p", suffix="s", trigger="t", templates=("a {caption}",)), "", ""),
        (CaptionRules(prefix="p", trigger="t"), " \n", " \n"),
        (CaptionRules(templates=("{caption}",)), "{caption} \\1", "{caption} \\1"),
    ],
)
def test_words_are_put_before_and_after(rules: CaptionRules, caption: str, expected: str) -> None:
    assert rules.caption((caption,), 0, 3) == expected


def test_tags_are_shuffled_evenly_and_the_first_stay() -> None:
    found = [caption.split(", ") for caption in shown(CaptionRules(shuffle_tags=True, keep_tags=2), TAGS)]
    assert all(tags[:2] == ["cat", "tail"] and sorted(tags) == sorted(TAGS.split(", ")) for tags in found)
    assert len({tuple(tags) for tags in found}) == 24
    counts = Counter(tags[2] for tags in found)
    assert all(abs(counts[tag] / MANY - 0.25) < 0.04 for tag in ("paw", "ear", "nose", "whisker"))


def test_tags_are_dropped_at_their_rate_and_those_that_are_kept_never() -> None:
    rules = CaptionRules(tag_dropout=0.3, keep_tags=1, trigger="sks")
    found = [caption.split(", ") for caption in shown(rules, TAGS)]
    assert all(tags[:2] == ["sks", "cat"] for tags in found)
    counts = Counter(tag for tags in found for tag in tags)
    assert all(abs(counts[tag] / MANY - 0.7) < 0.04 for tag in ("tail", "paw", "ear", "nose", "whisker"))
    together = np.array([["tail" in tags, "paw" in tags] for tags in found], float)
    assert abs(np.corrcoef(together.T)[0, 1]) < 0.06
    assert set(shown(CaptionRules(tag_dropout=1.0, prefix="of "), TAGS, count=9)) == {"of "}


def test_no_rule_changes_what_another_draws() -> None:
    alone = shown(CaptionRules(shuffle_tags=True), TAGS, count=200)
    both = shown(CaptionRules(shuffle_tags=True, tag_dropout=0.4, prefix="a "), TAGS, count=200)
    for whole, part in zip(alone, both, strict=True):
        kept = [tag for tag in part.removeprefix("a ").split(", ") if tag]
        assert kept == [tag for tag in whole.split(", ") if tag in kept]


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ((), (1 / 3,) * 3),
        ((1.0, 3.0), (1 / 7, 3 / 7, 3 / 7)),
        ((0.0, 1.0, 0.0), (0, 1, 0)),
        ((2.0, 1.0, 1.0, 9.0), (0.5, 0.25, 0.25)),
    ],
)
def test_several_captions_are_drawn_by_weight(weights: tuple[float, ...], shares: tuple[float, ...]) -> None:
    counts = Counter(shown(CaptionRules(several="draw", weights=weights), "a", "b", "c"))
    assert all(abs(counts[name] / MANY - share) < 0.04 for name, share in zip("abc", shares, strict=True))
    assert set(shown(CaptionRules(several="draw", weights=(0.0, 1.0)), "alone", count=20)) == {"alone"}
    both = Counter(shown(CaptionRules(several="draw", templates=("1{caption}", "2{caption}")), "a", "b"))
    assert all(abs(both[name] / MANY - 0.25) < 0.04 for name in ("1a", "2a", "1b", "2b"))


def test_a_validation_shows_captions_with_nothing_drawn() -> None:
    config = default_config()
    for path, text in {
        "shuffle_tags": "True",
        "tag_dropout": "0.5",
        "several": "draw",
        "weights": "(0.0, 1.0)",
    }.items():
        override(config, f"captions.{path}", text)
    override(config, "captions.trigger", "sks")
    override(config, "captions.templates", "('art of {caption}', '{caption}')")
    rules = validation_batching(batching_of(config), 1).captions
    assert not rules.draws and set(shown(rules, "a, b", "c", count=9)) == {"sks, art of a, b"}


class Tagged:
    """Forty pictures with two captions of six tags."""

    label = "tagged"

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Picture:
        tags = [f"{index}-{number}" for number in range(6)]
        picture = np.zeros((8, 8, 3), np.uint8)
        picture[:, :4] = 255
        return Picture(picture, ", ".join(tags), "", (f"other {index}, x",))

    def fingerprint(self) -> dict[str, Any]:
        return {}

    def shares_records(self, other: Source) -> bool:
        return False


def test_captions_resume_exactly_on_any_number_of_processes_and_leave_flips_alone() -> None:
    def tokenize(caption: str) -> tuple[dict[str, np.ndarray], int, int]:
        return {"text": np.array([zlib.crc32(caption.encode()) & 0x7FFFFFFF])}, 1, 1

    def take(rules: CaptionRules, start: int, count: int, rows: Any = None, seed: int = 3) -> list[dict[str, Any]]:
        options = {"global_batch_size": 8, "resolution": 8, "random_flip": True, "tokenize": tokenize}
        batches = make_stream(Tagged(), seed=seed, rows=rows, captions=rules, **options).iterator(start)
        with contextlib.closing(batches):
            return [next(batches) for _ in range(count)]

    rules = CaptionRules(several="draw", shuffle_tags=True, tag_dropout=0.3, prefix="p ")
    whole = take(rules, 0, 15)
    ids = np.concatenate([batch["input_ids"]["text"] for batch in whole])
    resumed = np.concatenate([batch["input_ids"]["text"] for batch in take(rules, 7, 8)])
    np.testing.assert_array_equal(resumed, ids[7 * 8 :])
    half = np.concatenate([batch["input_ids"]["text"] for batch in take(rules, 0, 15, rows=range(4, 8))])
    np.testing.assert_array_equal(half, ids.reshape(15, 8, 1)[:, 4:].reshape(-1, 1))
    by_example: dict[int, set[int]] = {}
    for batch in whole:
        for index, found in zip(batch["index"], batch["input_ids"]["text"][:, 0], strict=True):
            by_example.setdefault(int(index), set()).add(int(found))
    assert len(by_example) == 40 and sum(len(found) > 1 for found in by_example.values()) > 35  # another each epoch
    assert (np.concatenate([batch["input_ids"]["text"] for batch in take(rules, 0, 2, seed=4)]) != ids[:16]).any()
    for one, other in zip(whole, take(CaptionRules(), 0, 15), strict=True):
        np.testing.assert_array_equal(one["pixels"], other["pixels"])
        np.testing.assert_array_equal(one["index"], other["index"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"captions.weights": "(1.0,)"}, r"captions\.weights cannot apply without captions\.several = 'draw'"),
        ({"captions.keep_tags": "2"}, r"captions\.keep_tags cannot apply without captions\.shuffle_tags or"),
        ({"captions.separator": "|"}, r"captions\.separator cannot apply without"),
        ({"captions.separator": ""}, r"captions\.separator = '' must be not empty"),
        (
            {"captions.weights": "(0.0,)", "captions.several": "draw"},
            r"captions\.weights .* must be numbers of at least 0",
        ),
        ({"captions.tag_dropout": "1.5"}, r"captions\.tag_dropout = 1\.5 must be between 0 and 1"),
        ({"captions.templates": "('art',)"}, r"captions\.templates has \['art'\], without a place for the caption"),
        ({"captions.several": "draw", "data.cached_latents": "True"}, r"cannot apply with data\.cached_latents"),
        ({"captions.prefix": "a", "task": "autoencoder"}, r"captions\.prefix.* cannot apply to task = 'autoencoder'"),
    ],
)
def test_rules_that_cannot_apply_are_refused(changes: dict[str, str], message: str) -> None:
    config = default_config()
    for path, text in changes.items():
        override(config, path, text)
    with pytest.raises(UserError, match=message) as raised:
        validate(config)
    assert "\n" not in str(raised.value)
