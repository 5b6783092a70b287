"""Captions → token ids, as CLIP's tokenizer gives them: read from files, from CLIP's own vocabulary, or learned.

    the marks and other added tokens are taken out → cleaned, composed (NFC), lower case → words → bytes → merges

A vocabulary is the 256 symbols of bytes, the same as the ends of words, what each merge makes, and the two marks.
"""

import functools
import gzip
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers as library
from etils import epath
from jaxtyping import Int
from tokenizers import models, pre_tokenizers, trainers

from offsetjax.errors import UserError
from offsetjax.formats.tokenizer import END, START, WORDS, Vocabulary, bpe_model, read_vocabulary, write_vocabulary
from offsetjax.json_text import parse_object

_VOCABULARY = Path(__file__).with_name("clip_vocabulary.txt.gz")
_NUM_MERGES, _MAX_LENGTH = 48_894, 77  # of OpenAI's models, and of OpenCLIP's with the same vocabulary
_YPOGEGRAMMENI = "\u0345"  # a mark whose capital is a letter: the words' pattern, blind to case, finds it nowhere

# Ideographs, each of which is a word: CJK's, its extensions A to E, and those for compatibility.
_IDEOGRAPHS = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


class Tokens(NamedTuple):
    """A caption as each of the e text encoders reads it, and how long it was before it was cut, marks included."""

    input_ids: Int[np.ndarray, "e n"]
    num_tokens: int


@dataclass(frozen=True)
class Tokenizer:
    """CLIP's tokenizer of a vocabulary; the ids are those of transformers' `CLIPTokenizer`."""

    vocabulary: Vocabulary

    def __len__(self) -> int:
        """The number of embeddings that its ids need."""
        return 1 + max(max(self.vocabulary.ids.values()), max(self.vocabulary.added.values()))

    @property
    def max_length(self) -> int:
        """Tokens a caption, marks included."""
        return self.vocabulary.max_length

    @property
    def bos_token_id(self) -> int:
        """The id of the mark that a caption begins with."""
        return self.vocabulary.added[self.vocabulary.bos_token]

    @property
    def eos_token_id(self) -> int:
        """The id of the mark that a caption ends with."""
        return self.vocabulary.added[self.vocabulary.eos_token]

    @property
    def pad_token_id(self) -> int:
        """The id of what fills up the rest."""
        return self.vocabulary.added[self.vocabulary.pad_token]

    def shortened(self, max_length: int) -> "Tokenizer":
        """The same tokenizer for captions of no more tokens than that."""
        return Tokenizer(replace(self.vocabulary, max_length=min(self.max_length, max_length)))

    def encode(self, text: str) -> list[int]:
        """All ids of a text, between the two marks, neither cut nor padded."""
        return [self.bos_token_id, *self._ids(text), self.eos_token_id]

    def _ids(self, text: str) -> Iterator[int]:
        for place, piece in enumerate(self._added.split(text)):
            if place % 2:
                yield self.vocabulary.added[piece]
                continue
            for word, _ in self._words.pre_tokenize_str(_cleaned(piece)):
                if word in (START, END):  # in capitals at first, or it had been taken out
                    yield self.vocabulary.ids.get(word, self.vocabulary.added[self.vocabulary.unk_token])
                else:
                    yield from (token.id for token in self._bpe.tokenize(word))

    @functools.cached_property
    def _added(self) -> re.Pattern:
        longest_first = sorted(self.vocabulary.added, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    @functools.cached_property
    def _words(self) -> pre_tokenizers.PreTokenizer:
        split = pre_tokenizers.Split(library.Regex(f"(?i){WORDS}"), behavior="removed", invert=True)
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    @functools.cached_property
    def _bpe(self) -> models.BPE:
        return bpe_model(self.vocabulary)


def _cleaned(text: str) -> str:
    """Without control characters, with ideographs apart, composed, in lower case, with single spaces."""
    if not (text.isascii() and text.isprintable()):
        text = unicodedata.normalize("NFC", "".join(map(_cleaned_character, text)))
    lower = " ".join(word.lower() for word in text.split())
    return lower.replace(_YPOGEGRAMMENI, " ")


@functools.lru_cache(maxsize=2**14)
def _cleaned_character(character: str) -> str:
    category = unicodedata.category(character)
    if character in "\t\n\r" or category == "Zs":
        return " "
    if category.startswith("C") or character == "\ufffd":
        return ""
    return f" {character} " if any(low <= ord(character) <= high for low, high in _IDEOGRAPHS) else character


def tokenize(tokenizers: Sequence[Tokenizer], caption: str) -> Tokens:
    """A caption's ids for each text encoder, padded or cut to their length as PyTorch's pipelines do.

    Raises:
        UserError: the tokenizers are of different lengths.
    """
    lengths = {tokenizer.max_length for tokenizer in tokenizers}
    if len(lengths) > 1:
        raise UserError(f"tokenizer: the text encoders read {sorted(lengths)} tokens; they must read the same number")
    length = lengths.pop() if lengths else 0
    whole = [tokenizer.encode(caption) for tokenizer in tokenizers]
    rows = [
        [*ids[: length - 1], tokenizer.eos_token_id]
        if len(ids) > length
        else ids + [tokenizer.pad_token_id] * (length - len(ids))
        for tokenizer, ids in zip(tokenizers, whole, strict=True)
    ]
    return Tokens(np.array(rows, np.int32).reshape(len(rows), length), max(map(len, whole), default=0))


def clip_tokenizer(pad_token: str = END) -> Tokenizer:
    """CLIP's tokenizer, of 49,408 tokens, 77 a caption.

    Args:
        pad_token: that of the diffusers directory: the end mark for OpenAI's text encoder (SD 1, SDXL's first), and
            "!" for OpenCLIP's (SD 2, SDXL's second), whose captions then have no "!" of their own at a word's end.
    """
    lines = gzip.decompress(_VOCABULARY.read_bytes()).decode().splitlines()
    merges = [(left, right) for left, right in (line.split() for line in lines[1 : 1 + _NUM_MERGES])]
    return _from_merges(merges, pad_token, _MAX_LENGTH)


def load_tokenizer(directory: epath.PathLike) -> Tokenizer:
    """The tokenizer of a diffusers directory's `tokenizer/` or `tokenizer_2/`.

    Raises:
        UserError: files are missing or damaged, or it is another kind of tokenizer.
    """
    return Tokenizer(read_vocabulary(directory))


def save_tokenizer(tokenizer: Tokenizer, directory: epath.PathLike) -> None:
    """Writes the files that `load_tokenizer`, and transformers, read."""
    write_vocabulary(directory, tokenizer.vocabulary)


def train_tokenizer(captions: Iterable[str], vocab_size: int, max_length: int) -> Tokenizer:
    """A tokenizer in CLIP's form whose merges are learned from captions, for models made from scratch.

    Args:
        vocab_size: the most tokens that it may have, the 514 of bytes and marks included.
        max_length: tokens a caption, marks included.
    """
    captions = [caption.lower() for caption in captions]
    # Ties between merges go by the symbols' numbers, and the trainer numbers the last letters of words at random
    # unless they are given: each process of a pod, and each run, must learn the same.
    last_letters = [letter + "</w>" for letter in sorted(set("".join(captions)))]
    bpe = library.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, end_of_word_suffix="</w>", special_tokens=last_letters, show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in parse_object(bpe.to_str())["model"]["merges"]]
    symbols = _symbols()
    known, kept = set(symbols), []
    for left, right in merges:  # a merge of a symbol outside the bytes' alphabet can never apply
        if left in known and right in known:
            known.add(left + right)
            kept.append((left, right))
    least = len(symbols) + 2
    if vocab_size < least:
        raise UserError(f"config: model.text_encoder.vocab_size = {vocab_size} must be at least {least}")
    return _from_merges(kept[: vocab_size - least], END, max_length)


def _from_merges(merges: Sequence[tuple[str, str]], pad_token: str, max_length: int) -> Tokenizer:
    words = [*_symbols(), *(left + right for left, right in merges), START, END]
    ids = {word: index for index, word in enumerate(dict.fromkeys(words))}
    return Tokenizer(Vocabulary(ids, tuple(merges), max_length, pad_token=pad_token))


def _symbols() -> list[str]:
    """CLIP's printable symbol for each byte (as in GPT-2's tokenizer), and the same for the last of a word."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    return alphabet + [symbol + "</w>" for symbol in alphabet]
