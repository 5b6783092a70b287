"""A tokenizer in CLIP's form (byte-level BPE with ends of words, arXiv 2103.00020) as files, in both of their forms.

vocab.json, merges.txt            the tokens' ids, and the pairs that become one, the first of them first
tokenizer.json                    both in one file of the `tokenizers` library, all that transformers 5 writes
tokenizer_config.json             the marks of begin and end, the padding, how long a caption may be
special_tokens_map.json, added_tokens.json    the marks, and further tokens, of files from before 2023
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import tokenizers as library
from etils import epath
from tokenizers import models, normalizers, pre_tokenizers, processors

from offsetjax.errors import UserError
from offsetjax.json_text import parse_object

START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
# Marks, apostrophes with what English has after them, words, single digits, and what is none of these.
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
UNLIMITED = int(1e30)  # a `model_max_length` that files of unknown length have
_MARKS = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
_CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")


@dataclass(frozen=True)
class Vocabulary:
    """What the files say.

    Attributes:
        ids: of the tokens that merges make and of the marks.
        merges: pairs of tokens that become one, the first of them first.
        max_length: tokens a caption, marks included.
        added: ids of the tokens that are taken out of a text as they stand, before it is split into words; the marks
            and the padding are among them.
    """

    ids: Mapping[str, int]
    merges: tuple[tuple[str, str], ...]
    max_length: int = UNLIMITED
    bos_token: str = START
    eos_token: str = END
    unk_token: str = END
    pad_token: str = END
    added: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        marks = {mark: self.ids[mark] for mark in self.marks if mark in self.ids}
        object.__setattr__(self, "added", {**marks, **self.added})

    @property
    def marks(self) -> tuple[str, ...]:
        """The tokens with a role."""
        return self.bos_token, self.eos_token, self.unk_token, self.pad_token


def read_vocabulary(directory: epath.PathLike) -> Vocabulary:
    """The tokenizer of a diffusers directory's `tokenizer/` or `tokenizer_2/`, in either form.

    Raises:
        UserError: files are missing or damaged, or it is another kind of tokenizer.
    """
    folder = epath.Path(directory)
    missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
    is_whole = (folder / "tokenizer.json").is_file()
    if missing and not is_whole:
        raise UserError(
            f"tokenizer: {folder} has no {missing[0]}, nor a tokenizer.json; is it the tokenizer/ of a diffusers "
            "directory?"
        )
    try:
        return _of_tokenizer_json(folder) if missing else _of_vocabulary_and_merges(folder)
    except ValueError as error:
        raise UserError(f"tokenizer: {folder}/{error}; fetch it again") from error


def _of_vocabulary_and_merges(folder: epath.Path) -> Vocabulary:
    """Raises ValueError, which says what is wrong with which file."""
    ids = _ids(_json(folder, "vocab.json"), "vocab.json")
    try:
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"merges.txt cannot be read: it is not UTF-8 ({error.reason})") from error
    first = 1 if lines[0].startswith("#version") else 0
    pairs = [line.split() for line in lines[first:] if line.strip()]
    return _checked(folder, ids, pairs, {}, "merges.txt")


def _of_tokenizer_json(folder: epath.Path) -> Vocabulary:
    """Raises ValueError, which says what is wrong with which file."""
    name = "tokenizer.json"
    content = _json(folder, name)
    model = content.get("model")
    if not isinstance(model, dict):
        raise ValueError(f"{name} cannot be read: it has no model")
    kind, suffix = model.get("type", "BPE"), model.get("end_of_word_suffix")
    if kind != "BPE" or suffix != END_OF_WORD:
        raise ValueError(
            f"{name} is of another kind ({_shown(kind)}, ends of words {_shown(suffix)}) than CLIP's tokenizer"
        )
    if not isinstance(model.get("merges"), list):
        raise ValueError(f"{name} cannot be read: its model has no merges")
    pairs = [pair.split() if isinstance(pair, str) else pair for pair in model["merges"]]
    added = content.get("added_tokens") or []
    are_tokens = isinstance(added, list) and all(
        isinstance(each, dict) and isinstance(each.get("content"), str) for each in added
    )
    if not are_tokens:
        raise ValueError(f"{name} cannot be read: its added_tokens are no list of tokens")
    return _checked(
        folder,
        _ids(model.get("vocab"), name),
        pairs,
        _ids({each.get("content"): each.get("id") for each in added}, name),
        name,
    )


def _checked(folder: epath.Path, ids: dict[str, int], pairs: list, added: dict[str, int], name: str) -> Vocabulary:
    """The vocabulary with what the other files say, if all goes together."""
    merges = []
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(half, str) and half for half in pair):
            raise ValueError(f"{name} is not whole: {_shown(pair)} is no pair of tokens")
        merges.append((pair[0], pair[1]))
    marks, max_length = _settings(folder)
    added = {**added, **_added(folder)}
    known = ids | added
    unknown = next((token for pair in merges for token in (*pair, "".join(pair)) if token not in ids), None)
    if unknown is not None:
        raise ValueError(f"{name} is not whole: its vocabulary lacks {_shown(unknown)}, which its merges have")
    made = {left + right for left, right in merges} | added.keys() | set(marks.values())
    unmade = next((token for token in ids if token not in made and len(token.removesuffix(END_OF_WORD)) != 1), None)
    if unmade is not None:
        raise ValueError(f"{name} is not whole: no merge makes {_shown(unmade)}")
    if not any(token.endswith(END_OF_WORD) for token in ids):
        raise ValueError(f"{name} is of another kind than CLIP's tokenizer: no token ends a word ({END_OF_WORD})")
    for mark, token in marks.items():
        if token not in known:
            raise ValueError(f"{name} is not whole: its vocabulary lacks {_shown(token)}, its {mark}")
    if len(set(known.values())) < len(known):
        raise ValueError(f"{name} cannot be read: two tokens have the same id")
    return Vocabulary(ids, tuple(merges), max_length, added=added, **marks)


def _settings(folder: epath.Path) -> tuple[dict[str, str], int]:
    """The marks by name, and how many tokens a caption may have."""
    config = _json(folder, "tokenizer_config.json", {})
    kind = config.get("tokenizer_class")
    if kind is not None and kind not in _CLASSES:
        raise ValueError(f"tokenizer_config.json is of another kind ({kind}) than CLIP's tokenizer")
    # Before there was `added_tokens_decoder`, the map of the marks went before the config.
    map_of_marks = _json(folder, "special_tokens_map.json", {})
    sources = (config, map_of_marks) if "added_tokens_decoder" in config else (map_of_marks, config)
    marks = {}
    for mark, default in _MARKS.items():
        found = next((source[mark] for source in sources if source.get(mark) is not None), default)
        token = found.get("content") if isinstance(found, dict) else found
        if not isinstance(token, str) or not token:
            raise ValueError(f"tokenizer_config.json cannot be read: its {mark} is {_shown(found)}")
        marks[mark] = token
    length = config.get("model_max_length", UNLIMITED)
    if isinstance(length, bool) or not isinstance(length, int | float) or not length >= 2 or length > 2 * UNLIMITED:
        raise ValueError(f"tokenizer_config.json has model_max_length = {_shown(length)}, no length")
    return marks, int(length)


def _added(folder: epath.Path) -> dict[str, int]:
    """Tokens beyond those of the vocabulary."""
    name = "tokenizer_config.json"
    decoder = _json(folder, name, {}).get("added_tokens_decoder")
    if decoder is None:
        name = "added_tokens.json"
        return _ids(_json(folder, name, {}), name)
    if not isinstance(decoder, dict) or not all(
        key.isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str)
        for key, token in decoder.items()
    ):
        raise ValueError(f"{name} cannot be read: its added_tokens_decoder is no map of ids")
    return _ids({token.get("content"): int(key) for key, token in decoder.items()}, name)


def _ids(content: Any, name: str) -> dict[str, int]:
    if not isinstance(content, dict):
        raise ValueError(f"{name} cannot be read: it holds no vocabulary")
    for token, number in content.items():
        is_text = isinstance(token, str) and not any("\ud800" <= character <= "\udfff" for character in token)
        if not is_text or type(number) is not int or not 0 <= number < 2**31:
            raise ValueError(f"{name} cannot be read: {_shown(token)} has the id {_shown(number)}")
    return content


def _shown(value: Any) -> str:
    return repr(value)[:80]


def _json(folder: epath.Path, name: str, default: Any = None) -> dict[str, Any]:
    """The object in a file; `default` where there is no such file.

    Raises:
        ValueError: it is no JSON, or no object.
    """
    if default is not None and not (folder / name).is_file():
        return default
    try:
        return parse_object((folder / name).read_bytes())
    except ValueError as error:
        raise ValueError(f"{name} cannot be read: {error}") from error


def write_vocabulary(directory: epath.PathLike, vocabulary: Vocabulary) -> None:
    """Writes both forms, as transformers 4 and 5 have them."""
    folder = epath.Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in _files(vocabulary):
        (folder / name).write_text(text, encoding="utf-8")


def _files(vocabulary: Vocabulary) -> Iterator[tuple[str, str]]:
    def dumped(content: Mapping[str, Any]) -> str:
        return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    yield "vocab.json", dumped(vocabulary.ids)
    yield "merges.txt", "".join(f"{line}\n" for line in ("#version: 0.2", *map(" ".join, vocabulary.merges)))
    whole = {mark: _added_token(token, True) for mark, token in zip(_MARKS, vocabulary.marks, strict=True)}
    marks: dict[str, Any] = dict(zip(_MARKS, vocabulary.marks, strict=True))
    yield "special_tokens_map.json", dumped(whole | {"pad_token": marks["pad_token"]})
    decoder = {
        str(number): _added_token(token, token in _normalised(vocabulary)) | {"special": True}
        for token, number in sorted(vocabulary.added.items(), key=lambda item: item[1])
    }
    config = marks | {
        "added_tokens_decoder": decoder,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "extra_special_tokens": {},
        "model_max_length": vocabulary.max_length,
        "tokenizer_class": "CLIPTokenizer",
    }
    yield "tokenizer_config.json", dumped(config)
    yield "tokenizer.json", _tokenizer_json(vocabulary)


def _added_token(token: str, is_normalised: bool) -> dict[str, Any]:
    return {"content": token, "lstrip": False, "normalized": is_normalised, "rstrip": False, "single_word": False}


def _normalised(vocabulary: Vocabulary) -> tuple[str, ...]:
    return vocabulary.bos_token, vocabulary.eos_token, vocabulary.unk_token


def _tokenizer_json(vocabulary: Vocabulary) -> str:
    whole = library.Tokenizer(bpe_model(vocabulary))
    whole.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(library.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(library.Regex(WORDS), behavior="removed", invert=True)
    whole.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    whole.decoder = library.decoders.ByteLevel()
    whole.add_special_tokens(
        [
            library.AddedToken(token, normalized=token in _normalised(vocabulary), special=True)
            for token, _ in sorted(vocabulary.added.items(), key=lambda item: item[1])
        ]
    )
    ends = [(mark, vocabulary.added[mark]) for mark in (vocabulary.eos_token, vocabulary.bos_token)]
    whole.post_processor = processors.RobertaProcessing(*ends, trim_offsets=False, add_prefix_space=False)
    return whole.to_str(pretty=True)


def bpe_model(vocabulary: Vocabulary) -> models.BPE:
    """The merges of a word's symbols."""
    return models.BPE(
        dict(vocabulary.ids),
        list(vocabulary.merges),
        continuing_subword_prefix="",
        end_of_word_suffix=END_OF_WORD,
        unk_token=vocabulary.unk_token if vocabulary.unk_token in vocabulary.ids else None,
    )
