"""Captions → token ids: transformers' CLIPTokenizer, read from files, from CLIP's own vocabulary, or learned.

A tokenizer in CLIP's form (byte-level BPE, arXiv 2103.00020) is its list of merges: the vocabulary is the 256 symbols
of bytes, the same as the ends of words, what each merge makes, and the two marks.
"""

import gzip
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers as bpe_tokenizers
from etils import epath
from jaxtyping import Int
from transformers import CLIPTokenizer

from offsetjax.errors import UserError, one_line

_START, _END = "<|startoftext|>", "<|endoftext|>"
_VOCABULARY = Path(__file__).with_name("clip_vocabulary.txt.gz")
_NUM_MERGES, _MAX_LENGTH = 48_894, 77  # of OpenAI's models, and of OpenCLIP's with the same vocabulary


class Tokens(NamedTuple):
    """A caption as each of the e text encoders reads it, and how long it was before it was cut, marks included."""

    input_ids: Int[np.ndarray, "e n"]
    num_tokens: int


def tokenize(tokenizers: Sequence[CLIPTokenizer], caption: str) -> Tokens:
    """A caption's ids for each text encoder, padded or cut to their length as PyTorch's pipelines do.

    Raises:
        UserError: the tokenizers are of different lengths.
    """
    lengths = {tokenizer.model_max_length for tokenizer in tokenizers}
    if len(lengths) > 1:
        raise UserError(f"tokenizer: the text encoders read {sorted(lengths)} tokens; they must read the same number")
    length = lengths.pop() if lengths else 0
    whole = [tokenizer(caption, verbose=False).input_ids for tokenizer in tokenizers]
    rows = [
        [*ids[: length - 1], tokenizer.eos_token_id]
        if len(ids) > length
        else ids + [tokenizer.pad_token_id] * (length - len(ids))
        for tokenizer, ids in zip(tokenizers, whole, strict=True)
    ]
    return Tokens(np.array(rows, np.int32).reshape(len(rows), length), max(map(len, whole), default=0))


def clip_tokenizer(pad_token: str = _END) -> CLIPTokenizer:
    """CLIP's tokenizer, of 49,408 tokens, 77 a caption.

    Args:
        pad_token: that of the diffusers directory: the end mark for OpenAI's text encoder (SD 1, SDXL's first), and
            "!" for OpenCLIP's (SD 2, SDXL's second), whose captions then have no "!" of their own at a word's end.
    """
    lines = gzip.decompress(_VOCABULARY.read_bytes()).decode().splitlines()
    merges = [(left, right) for left, right in (line.split() for line in lines[1 : 1 + _NUM_MERGES])]
    return _from_merges(merges, pad_token, _MAX_LENGTH)


def load_tokenizer(directory: epath.PathLike) -> CLIPTokenizer:
    """The tokenizer of a diffusers directory's `tokenizer/` or `tokenizer_2/`.

    Raises:
        UserError: files are missing or broken.
    """
    directory = epath.Path(directory)
    missing = [name for name in ("vocab.json", "merges.txt") if not (directory / name).exists()]
    if missing:
        raise UserError(f"tokenizer: {directory} has no {missing[0]}; is it the tokenizer/ of a diffusers directory?")
    with tempfile.TemporaryDirectory() as local:  # transformers reads local files alone
        for file in directory.iterdir():
            (Path(local) / file.name).write_bytes(file.read_bytes())
        try:
            tokenizer = CLIPTokenizer.from_pretrained(local)
        except (ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError) as error:
            what = one_line(error)
            raise UserError(f"tokenizer: {directory} cannot be read: {what}; fetch it again") from error
    if len(tokenizer.encoder) > len(_symbols()) + len(tokenizer.bpe_ranks) + 2:  # words that no merge makes
        raise UserError(f"tokenizer: {directory}/merges.txt is not whole; fetch it again")
    if not isinstance(tokenizer.model_max_length, int | float) or tokenizer.model_max_length < 2:
        length = tokenizer.model_max_length
        raise UserError(f"tokenizer: {directory} has model_max_length = {length!r}, no length; fetch it again")
    return tokenizer


def save_tokenizer(tokenizer: CLIPTokenizer, directory: epath.PathLike) -> None:
    """Writes the files that `load_tokenizer`, and transformers, read."""
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as local:
        tokenizer.save_pretrained(local)
        for file in Path(local).iterdir():
            (directory / file.name).write_bytes(file.read_bytes())


def train_tokenizer(captions: Iterable[str], vocab_size: int, max_length: int) -> CLIPTokenizer:
    """A tokenizer in CLIP's form whose merges are learned from captions, for models made from scratch.

    Args:
        vocab_size: the most tokens that it may have, the 514 of bytes and marks included.
        max_length: tokens a caption, marks included.
    """
    captions = [caption.lower() for caption in captions]
    # Ties between merges go by the symbols' numbers, and the trainer numbers the last letters of words at random
    # unless it is told them: each process of a pod, and each run, must learn the same.
    last_letters = [letter + "</w>" for letter in sorted(set("".join(captions)))]
    bpe = bpe_tokenizers.Tokenizer(bpe_tokenizers.models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = bpe_tokenizers.pre_tokenizers.Whitespace()
    trainer = bpe_tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, end_of_word_suffix="</w>", special_tokens=last_letters, show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    symbols = _symbols()
    known, kept = set(symbols), []
    for left, right in merges:  # a merge of a symbol outside the bytes' alphabet can never apply
        if left in known and right in known:
            known.add(left + right)
            kept.append((left, right))
    least = len(symbols) + 2
    if vocab_size < least:
        raise UserError(f"config: model.text_encoder.vocab_size = {vocab_size} must be at least {least}")
    return _from_merges(kept[: vocab_size - least], _END, max_length)


def _from_merges(merges: Sequence[tuple[str, str]], pad_token: str, max_length: int) -> CLIPTokenizer:
    words = [*_symbols(), *(left + right for left, right in merges), _START, _END]
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    with tempfile.TemporaryDirectory() as local:
        vocabulary, rules = Path(local) / "vocab.json", Path(local) / "merges.txt"
        vocabulary.write_text(json.dumps({word: index for index, word in enumerate(dict.fromkeys(words))}))
        rules.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return CLIPTokenizer(str(vocabulary), str(rules), pad_token=pad_token, model_max_length=max_length)


def _symbols() -> list[str]:
    """CLIP's printable symbol for each byte (as in GPT-2's tokenizer), and the same for the last of a word."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    return alphabet + [symbol + "</w>" for symbol in alphabet]
