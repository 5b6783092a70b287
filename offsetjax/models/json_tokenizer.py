"""Captions → token ids by a `tokenizer.json`, as transformers' fast tokenizers give them: Qwen3's and T5's.

A chat model reads a caption as what a user says, and what it is about to answer:

    <|im_start|>user⏎{caption}<|im_end|>⏎<|im_start|>assistant⏎                      Z-Image
    <|im_start|>user⏎{caption}<|im_end|>⏎<|im_start|>assistant⏎<think>⏎⏎</think>⏎⏎   FLUX.2 klein: without thoughts
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass

import tokenizers as library
from etils import epath

from offsetjax.errors import UserError, one_line
from offsetjax.json_text import parse_json

_FILE, _CONFIG = "tokenizer.json", "tokenizer_config.json"


@dataclass(frozen=True)
class Template:
    """What stands before and after a caption; the marks in it, as `<|im_end|>`, are tokens of their own."""

    before: str = ""
    after: str = ""


PLAIN = Template()
CHAT = Template("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
CHAT_WITHOUT_THOUGHTS = Template(CHAT.before, f"{CHAT.after}<think>\n\n</think>\n\n")


@dataclass(frozen=True)
class JsonTokenizer:
    """A tokenizer, and what it was read from.

    Attributes:
        files: of its folder, by name, to be written as they are.
        max_length: tokens a caption, the template's included.
        template: around each caption.
        where: what an error begins with.

    Raises:
        UserError: files are missing or damaged, or the tokenizer does not have the template's marks.
    """

    files: Mapping[str, bytes]
    max_length: int
    template: Template = PLAIN
    where: str = "tokenizer"

    def __post_init__(self) -> None:
        if _FILE not in self.files:
            raise UserError(f"{self.where} has no {_FILE}; fetch the whole folder")
        tokenizer = self._tokenizer
        for mark in re.findall(r"<[^<>\s]+>", self.template.before + self.template.after):
            if tokenizer.token_to_id(mark) is None:
                raise UserError(
                    f"{self.where}: {_FILE} has no token {mark}, and is no chat model's; give the model's own"
                )
        if self.pad_token_id < 0:
            raise UserError(f"{self.where}: {_CONFIG} names no pad_token of {_FILE}; fetch the whole folder again")

    def __len__(self) -> int:
        """The number of embeddings that its ids need."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    @functools.cached_property
    def pad_token_id(self) -> int:
        """The id of what fills up the rest; -1: there is none."""
        token = self._config().get("pad_token")
        token = token.get("content") if isinstance(token, dict) else token
        found = self._tokenizer.token_to_id(token) if isinstance(token, str) else None
        return -1 if found is None else found

    def encode(self, caption: str) -> list[int]:
        """All ids of a caption in its template, neither cut nor padded."""
        return self._tokenizer.encode(f"{self.template.before}{caption}{self.template.after}").ids

    def padded(self, caption: str) -> tuple[list[int], int]:
        """The ids cut or padded to `max_length`, and how many the caption has uncut.

        What a tokenizer adds at the end, as T5's mark, is not cut; of a template it is, as PyTorch's pipelines do.
        """
        ids = self.encode(caption)
        kept = self._tokenizer.num_special_tokens_to_add(False)
        cut = ids if len(ids) <= self.max_length else [*ids[: self.max_length - kept], *ids[len(ids) - kept :]]
        return [*cut, *[self.pad_token_id] * (self.max_length - len(cut))], len(ids)

    @functools.cached_property
    def _tokenizer(self) -> library.Tokenizer:
        try:
            tokenizer = library.Tokenizer.from_str(self.files[_FILE].decode())
        except Exception as error:  # the library has no class of its own for what it cannot read
            raise UserError(f"{self.where}: {_FILE} cannot be read: {one_line(error)}; fetch it again") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def _config(self) -> dict:
        try:
            config = parse_json(self.files.get(_CONFIG, b"{}"))
        except ValueError as error:
            raise UserError(f"{self.where}: {_CONFIG} is not JSON ({one_line(error)}); fetch it again") from error
        return config if isinstance(config, dict) else {}


def read_tokenizer(directory: epath.PathLike, max_length: int, template: Template = PLAIN) -> JsonTokenizer:
    """The tokenizer of a model's `tokenizer/`; folders in it are not read.

    Raises:
        UserError: files are missing or damaged, or the tokenizer does not have the template's marks.
    """
    directory = epath.Path(directory)
    if not directory.exists():
        raise UserError(f"tokenizer: {directory} is missing; fetch the whole model")
    files = {file.name: file.read_bytes() for file in sorted(directory.iterdir()) if not file.is_dir()}
    return JsonTokenizer(files, max_length, template, f"tokenizer: {directory}")


def write_tokenizer(tokenizer: JsonTokenizer, directory: epath.PathLike) -> None:
    """Writes the files that were read, as they were."""
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer.files.items():
        (directory / name).write_bytes(content)
