"""Captions become the ids that CLIP's own code gives, whether the tokenizer is CLIP's, read from files, or learned."""

import pathlib
import pickle
import random
import tomllib

import numpy as np
import pytest
import transformers

from offsetjax.errors import UserError
from offsetjax.models.tokenizer import (
    Tokenizer,
    clip_tokenizer,
    load_tokenizer,
    save_tokenizer,
    tokenize,
    train_tokenizer,
)
from tests import torch_models

CAPTIONS = [
    "a ski slope on a sunny day, dramatic light",
    "Dark alley in a rainstorm, dramatic light",
    "a town square lit only by torchlight",
    "monochrome line-art logo on a white background",
]
# Computed once with open_clip 3.3.0's SimpleTokenizer, which is OpenAI's code, without the two marks.
KNOWN_IDS = {
    "a photo of a cat": "320 1125 539 320 2368",
    "A photograph of an astronaut riding a horse on Mars, 4k": (
        "320 8853 539 550 18376 6765 320 4558 525 7496 267 275 330"
    ),
    "Don't stop; it's 1997 (really)...": "847 713 1691 282 585 568 272 280 280 278 263 1414 15274",
    "naïve café – Größe 雪 🎿 привет": (
        "1097 35689 563 15304 1224 709 7255 127 253 324 165 249 359 1165 379 26302 16370 29503 110 22176 141 480"
    ),
    "supercalifragilisticexpialidocious  two\tspaces\n new line": (
        "1642 2857 13093 2076 5868 26850 835 639 38466 1237 9006 686 1148"
    ),
    "watermark_removed @user #hashtag https://x.io/a?b=1": (
        "2505 2110 318 10289 287 7031 258 9238 30901 12441 343 269 3752 270 320 286 321 284 272"
    ),
    "": "",
}
STRANGE = ["Grüße aus Köln", "雪のスロープ", "🎿 ski!", "naïve 100% (50/50)", "x\ty"]


def all_ids(tokenizer: Tokenizer, captions: list[str]) -> np.ndarray:
    return np.stack([tokenize([tokenizer], caption).input_ids[0] for caption in captions])


@pytest.fixture(scope="module")
def clips() -> list[Tokenizer]:
    """As SDXL has them; SD 1 has the first, SD 2 the second."""
    return [clip_tokenizer(), clip_tokenizer("!")]


def test_the_ids_of_clip_are_those_of_openais_code(clips: list[Tokenizer]) -> None:
    for caption, ids in KNOWN_IDS.items():
        tokens = tokenize(clips, caption)
        whole = [49406, *map(int, ids.split()), 49407]
        assert tokens.input_ids.shape == (2, 77) and tokens.input_ids.dtype == np.int32
        assert tokens.num_tokens == len(whole)
        assert tokens.input_ids[0].tolist() == whole + [49407] * (77 - len(whole))
        assert tokens.input_ids[1].tolist() == whole + [0] * (77 - len(whole))
    assert [len(each) for each in clips] == [49408, 49408]


def test_saved_pytorch_reads_both_of_sdxls_tokenizers_to_the_same_ids(
    clips: list[Tokenizer], tmp_path: pathlib.Path
) -> None:
    captions = [*CAPTIONS, *KNOWN_IDS, "wow! so good!", "torchlight " * 100]
    for tokenizer, name in zip(clips, ("tokenizer", "tokenizer_2"), strict=True):
        save_tokenizer(tokenizer, tmp_path / name)
        ids = all_ids(tokenizer, captions)
        np.testing.assert_array_equal(all_ids(load_tokenizer(tmp_path / name), captions), ids)
        # The fast one, which diffusers loads too, splits no Japanese into characters.
        plain = [place for place, caption in enumerate(captions) if "雪" not in caption]
        every = list(range(len(captions)))
        for theirs, places in ((transformers.CLIPTokenizer, every), (transformers.CLIPTokenizerFast, plain)):
            read = theirs.from_pretrained(tmp_path, subfolder=name)
            assert (read.model_max_length, len(read)) == (77, 49408)
            given = [captions[place] for place in places]  # called as diffusers' pipelines do
            encoded = read(given, padding="max_length", max_length=77, truncation=True, return_tensors="np")
            np.testing.assert_array_equal(encoded.input_ids, ids[places])


def test_the_number_of_tokens_is_that_before_the_cut(clips: list[Tokenizer]) -> None:
    for words, is_cut in ((74, False), (75, False), (76, True), (300, True)):
        tokens = tokenize(clips, "cat " * words)
        assert tokens.num_tokens == words + 2 and (tokens.num_tokens > tokens.input_ids.shape[1]) == is_cut
        expected = ([49406] + [2368] * min(words, 75) + [49407] * 2)[:77]
        assert tokens.input_ids[0].tolist() == expected
        assert tokens.input_ids[1].tolist()[:76] == expected[:76]
    assert tokenize((), "a cat").input_ids.shape == (0, 0), "an autoencoder reads no captions"


def test_text_encoders_of_different_lengths_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"the text encoders read \[24, 77\] tokens"):
        tokenize([tokenizer, clip_tokenizer()], "a cat")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(CAPTIONS * 3, 600, 24)


def test_saved_and_loaded_it_gives_the_same_ids(tokenizer: Tokenizer, tmp_path: pathlib.Path) -> None:
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    ids = all_ids(tokenizer, CAPTIONS + STRANGE)
    assert ids.dtype == np.int32 and ids.shape == (len(CAPTIONS + STRANGE), 24)
    np.testing.assert_array_equal(all_ids(load_tokenizer(tmp_path / "tokenizer"), CAPTIONS + STRANGE), ids)
    # The fast one does not split Chinese and Japanese into characters; it reads all else alike.
    for theirs, count in ((transformers.CLIPTokenizer, len(ids)), (transformers.CLIPTokenizerFast, len(CAPTIONS) + 1)):
        read = theirs.from_pretrained(tmp_path / "tokenizer")
        assert read.model_max_length == 24
        encoded = read((CAPTIONS + STRANGE)[:count], padding="max_length", truncation=True, return_tensors="np")
        np.testing.assert_array_equal(encoded.input_ids, ids[:count])


def test_ids_fit_the_embedding_and_words_of_the_captions_are_learned(tokenizer: Tokenizer) -> None:
    assert len(tokenizer) <= 600
    assert all_ids(tokenizer, CAPTIONS + STRANGE).max() < 600
    assert sorted(tokenizer.vocabulary.ids.values()) == list(range(len(tokenizer)))
    assert len(tokenizer.encode("dramatic light")) < 2 + len("dramaticlight")


def test_every_training_learns_the_same(tokenizer: Tokenizer) -> None:
    for _ in range(5):
        assert train_tokenizer(CAPTIONS * 3, 600, 24) == tokenizer


@pytest.mark.parametrize("caption", STRANGE)
def test_characters_that_no_caption_had_survive(tokenizer: Tokenizer, caption: str) -> None:
    ids = tokenizer.encode(caption)
    assert tokenizer.eos_token_id not in ids[1:-1]

    def letters(text: str) -> str:
        return "".join(text.lower().split())

    read = torch_models.tokenizer(tokenizer)
    assert letters(read.decode(ids, skip_special_tokens=True)) == letters(caption)


# Each is what some rule of the tokenizer is about.
ODD = (
    *("don't", "IT'S", "I'LL", "we've'd", "'", "''s", "&amp;lt;b&gt;", "<br/>", "!", "!!", "a!", "</w>", "a</w>", "Ġ"),
    *("<|startoftext|>", "<|endoftext|>", "<|StartOfText|>", "!<|ENDOFTEXT|>", "1234567", "_a_b_", "http://x.io/?a=b"),
    *("x" * 300, "ab" * 200, "ﬁ", "ﬀ", "½", "Ⅷ", "Σ", "ΟΔΟΣ", "İ", "ß", "'ſ", "\u212a", "e\u0301", "\u0345", "ά\u0345"),
    *("\u2028", "\x85", "\xa0", "\u3000", "\t", "\r\n", "\x00", "\ufffd", "\u200d", "\ufe0f"),
    *("雪", "の", "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea"),
)
BLOCKS = (
    *(range(32, 127), range(256), range(0x300, 0x500)),  # Latin, marks, Greek, Cyrillic
    *(range(0x590, 0x700), range(0x900, 0x980), range(0x1E00, 0x2100)),  # Hebrew, Arabic, Indic, punctuation
    *(range(0x2190, 0x2800), range(0x3000, 0x3100), range(0x4E00, 0x4F00), range(0xAC00, 0xAD00)),  # symbols, CJK
    *(range(0xD800, 0xE000), range(0xF900, 0x10000)),  # halves of pairs, forms for compatibility
    *(range(0x1F1E6, 0x1F700), range(0x20000, 0x20100)),  # emoji, rare ideographs
)


def odd_strings(count: int) -> list[str]:
    choice = random.Random(0)

    def piece() -> str:
        text = choice.choice(ODD) if choice.random() < 0.4 else chr(choice.choice(choice.choice(BLOCKS)))
        return text + " " * (choice.random() < 0.2)

    return [*ODD, *("".join(piece() for _ in range(choice.randrange(1, 25))) for _ in range(count - len(ODD)))]


@pytest.mark.parametrize("which", ["OpenAI's", "OpenCLIP's", "learned"])
def test_a_thousand_odd_strings_have_the_ids_of_transformers(
    which: str, clips: list[Tokenizer], tokenizer: Tokenizer
) -> None:
    ours = {"OpenAI's": clips[0], "OpenCLIP's": clips[1], "learned": tokenizer}[which]
    theirs = torch_models.tokenizer(ours)
    assert (len(ours), ours.max_length) == (len(theirs), theirs.model_max_length)
    roles = ("bos", "eos", "pad")
    assert [getattr(ours, f"{role}_token_id") for role in roles] == [
        getattr(theirs, f"{role}_token_id") for role in roles
    ]
    for text in odd_strings(1000):
        assert ours.encode(text) == theirs(text, verbose=False).input_ids, repr(text)


def test_a_word_of_any_length_is_read_in_no_time(clips: list[Tokenizer]) -> None:
    assert tokenize(clips, "a" * 100_000).num_tokens > 10_000


def test_it_goes_to_another_process_as_it_is(tokenizer: Tokenizer) -> None:
    tokenizer.encode("a cat")
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy == tokenizer and copy.encode(STRANGE[0]) == tokenizer.encode(STRANGE[0])


def test_a_long_caption_is_cut_to_the_length_with_the_end_mark(tokenizer: Tokenizer) -> None:
    long, short, empty = all_ids(tokenizer, ["torchlight " * 100, "light", ""])
    assert long[0] == short[0] == empty[0] == tokenizer.bos_token_id
    assert long[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in long[:-1]
    assert (short[-10:] == tokenizer.eos_token_id).all(), "PyTorch's pipelines pad with the end mark"
    assert (empty[1:] == tokenizer.eos_token_id).all()


def test_a_vocabulary_too_small_for_all_bytes_is_refused() -> None:
    with pytest.raises(UserError, match=r"vocab_size = 500 must be at least 514"):
        train_tokenizer(CAPTIONS, 500, 24)
    assert len(train_tokenizer(CAPTIONS, 514, 24)) == 514


def test_every_licence_in_the_package_goes_with_it() -> None:
    root = pathlib.Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    licences = {str(file.relative_to(root)) for file in (root / "offsetjax").rglob("*LICENSE*")}
    assert licences and set(project["license-files"]) == {"LICENSE", *licences}
