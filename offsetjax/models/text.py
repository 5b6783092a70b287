"""The text encoder, transformers' Flax CLIP, and its tokenizer."""

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tokenizers
from etils import epath
from jaxtyping import Array, Float, Int, Key, PyTree
from transformers import CLIPTextConfig, CLIPTokenizer, FlaxCLIPTextModel

from offsetjax.errors import UserError

_START, _END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class TextEncoder:
    """`init` and `apply`; `config` has transformers' names and values."""

    config: Mapping[str, Any]
    dtype: jnp.dtype
    class_name: str = "CLIPTextModel"

    def _module(self):
        return FlaxCLIPTextModel.module_class(CLIPTextConfig(**self.config), dtype=self.dtype)

    def _inputs(self, input_ids: Int[Array, "b n"]) -> tuple[Array, Array, Array]:
        # Stable Diffusion lets the padding be attended to: its mask is the causal one alone.
        positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        return input_ids, jnp.ones_like(input_ids), positions

    def init(self, key: Key[Array, ""]) -> PyTree:
        """Random float32 parameters."""
        return self._module().init(key, *self._inputs(jnp.zeros((1, 1), jnp.int32)))["params"]

    def apply(self, params: PyTree, input_ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        """The last hidden states, after the final layer norm."""
        return self._module().apply({"params": params}, *self._inputs(input_ids)).last_hidden_state

    def torch_config(self) -> dict[str, Any]:
        """The `config.json` that transformers reads."""
        config = CLIPTextConfig(**self.config, architectures=["CLIPTextModel"], torch_dtype="float32")
        return json.loads(config.to_json_string())


def load_tokenizer(directory: epath.PathLike) -> CLIPTokenizer:
    """The tokenizer of a diffusers directory's `tokenizer/`.

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
            return CLIPTokenizer.from_pretrained(local)
        except (ValueError, OSError, KeyError) as error:
            raise UserError(f"tokenizer: {directory} cannot be read: {error}") from error


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
    alphabet = list(_byte_symbols().values())
    # Ties between merges go by the symbols' numbers, and the trainer numbers the last letters of words at random
    # unless it is told them: each process of a pod, and each run, must learn the same.
    last_letters = [letter + "</w>" for letter in sorted(set("".join(captions)))]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, end_of_word_suffix="</w>", special_tokens=last_letters, show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    symbols = alphabet + [symbol + "</w>" for symbol in alphabet]
    known, kept = set(symbols), []
    for left, right in merges:  # a merge of a symbol outside the bytes' alphabet can never apply
        if left in known and right in known:
            known.add(left + right)
            kept.append((left, right))
    kept = kept[: max(0, vocab_size - len(symbols) - 2)]
    words = symbols + ["".join(pair) for pair in kept] + [_START, _END]
    if len(words) > vocab_size:
        raise UserError(f"config: model.text_encoder.vocab_size = {vocab_size} must be at least {len(words)}")
    with tempfile.TemporaryDirectory() as local:
        vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
        (Path(local) / "vocab.json").write_text(json.dumps(vocabulary))
        lines = ["#version: 0.2", *(" ".join(pair) for pair in kept)]
        (Path(local) / "merges.txt").write_text("\n".join(lines) + "\n")
        return CLIPTokenizer(
            str(Path(local) / "vocab.json"),
            str(Path(local) / "merges.txt"),
            pad_token=_END,
            model_max_length=max_length,
        )


def _byte_symbols() -> dict[int, str]:
    """CLIP's printable symbol for each byte (as in GPT-2's tokenizer)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Int[np.ndarray, "b n"]:
    """Token ids, padded and cut to the tokenizer's length."""
    encoded = tokenizer(captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length)
    return np.asarray(encoded.input_ids, np.int32)
