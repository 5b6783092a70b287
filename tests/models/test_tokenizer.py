"""The tokenizer learned from captions: one with CLIP's files, which loses no character and keeps to its length."""

import json
import pathlib

import numpy as np
import pytest
import transformers

from offsetjax.errors import UserError
from offsetjax.models.text import load_tokenizer, save_tokenizer, tokenize, train_tokenizer

CAPTIONS = [
    "a ski slope on a sunny day, dramatic light",
    "Dark alley in a rainstorm, dramatic light",
    "a town square lit only by torchlight",
    "monochrome line-art logo on a white background",
]
STRANGE = ["Grüße aus Köln", "雪のスロープ", "🎿 ski!", "naïve 100% (50/50)", "x\ty"]


@pytest.fixture(scope="module")
def tokenizer() -> transformers.CLIPTokenizer:
    return train_tokenizer(CAPTIONS * 3, 600, 24)


def test_saved_and_loaded_it_gives_the_same_ids(tokenizer: transformers.CLIPTokenizer, tmp_path: pathlib.Path) -> None:
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    ids = tokenize(tokenizer, CAPTIONS + STRANGE)
    assert ids.dtype == np.int32 and ids.shape == (len(CAPTIONS + STRANGE), 24)
    np.testing.assert_array_equal(tokenize(load_tokenizer(tmp_path / "tokenizer"), CAPTIONS + STRANGE), ids)
    # The fast one does not split Chinese and Japanese into characters; it reads all else alike.
    for theirs, count in ((transformers.CLIPTokenizer, len(ids)), (transformers.CLIPTokenizerFast, len(CAPTIONS) + 1)):
        read = theirs.from_pretrained(tmp_path / "tokenizer")
        assert read.model_max_length == 24
        encoded = read((CAPTIONS + STRANGE)[:count], padding="max_length", truncation=True, return_tensors="np")
        np.testing.assert_array_equal(encoded.input_ids, ids[:count])


def test_ids_fit_the_embedding_and_words_of_the_captions_are_learned(tokenizer: transformers.CLIPTokenizer) -> None:
    assert len(tokenizer) <= 600
    assert tokenize(tokenizer, CAPTIONS + STRANGE).max() < 600
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert len(tokenizer.tokenize("dramatic light")) < len("dramaticlight")


def test_every_training_learns_the_same(tokenizer: transformers.CLIPTokenizer) -> None:
    for _ in range(5):
        assert train_tokenizer(CAPTIONS * 3, 600, 24).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("caption", STRANGE)
def test_characters_that_no_caption_had_survive(tokenizer: transformers.CLIPTokenizer, caption: str) -> None:
    ids = tokenizer(caption).input_ids
    assert tokenizer.unk_token_id not in ids[1:-1]

    def letters(text: str) -> str:
        return "".join(text.lower().split())

    assert letters(tokenizer.decode(ids, skip_special_tokens=True)) == letters(caption)


def test_a_long_caption_is_cut_to_the_length_with_the_end_mark(tokenizer: transformers.CLIPTokenizer) -> None:
    long, short, empty = tokenize(tokenizer, ["torchlight " * 100, "light", ""])
    assert long[0] == short[0] == empty[0] == tokenizer.bos_token_id
    assert long[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in long[:-1]
    assert (short[-10:] == tokenizer.eos_token_id).all(), "PyTorch's pipelines pad with the end mark"
    assert (empty[1:] == tokenizer.eos_token_id).all()


def test_a_vocabulary_too_small_for_all_bytes_is_refused() -> None:
    with pytest.raises(UserError, match=r"vocab_size = 500 must be at least 514"):
        train_tokenizer(CAPTIONS, 500, 24)
    assert len(train_tokenizer(CAPTIONS, 514, 24)) == 514


def test_missing_and_broken_files_are_named(tokenizer: transformers.CLIPTokenizer, tmp_path: pathlib.Path) -> None:
    save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0})[:-1])
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"has no merges\.txt"):
        load_tokenizer(tmp_path)
