"""Tokenizers come from files in either form, and go into both; what is damaged or of another kind is told in a line."""

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import transformers

from offsetjax.errors import UserError
from offsetjax.formats.tokenizer import Vocabulary, read_vocabulary, write_vocabulary
from offsetjax.models.tokenizer import clip_tokenizer, train_tokenizer

CAPTIONS = ["a ski slope on a sunny day", "a dark alley in a rainstorm", "a ski logo, monochrome"]
OLD_FORM = ("vocab.json", "merges.txt", "special_tokens_map.json")


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return train_tokenizer(CAPTIONS, 600, 24).vocabulary


@pytest.fixture
def folder(vocabulary: Vocabulary, tmp_path: pathlib.Path) -> pathlib.Path:
    write_vocabulary(tmp_path, vocabulary)
    return tmp_path


def changed(folder: pathlib.Path, name: str, **values: Any) -> None:
    content = json.loads((folder / name).read_text()) | values
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "!"])
def test_the_files_are_those_of_transformers(pad_token: str, tmp_path: pathlib.Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    write_vocabulary(ours, clip_tokenizer(pad_token).vocabulary)
    files = str(ours / "vocab.json"), str(ours / "merges.txt")
    for kind in (transformers.CLIPTokenizerFast, transformers.CLIPTokenizer):
        kind(*files, pad_token=pad_token, model_max_length=77).save_pretrained(theirs)
    for file in theirs.iterdir():
        expected = file.read_text()
        if file.name == "tokenizer.json":  # since transformers 5 the words' pattern knows the marks
            expected = expected.replace(""""'s|'t""", r""""<\\|startoftext\\|>|<\\|endoftext\\|>|'s|'t""")
        assert (ours / file.name).read_text() == expected, file.name
    assert len(list(theirs.iterdir())) == len(list(ours.iterdir())) == 5


@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "!"])
def test_one_file_holds_what_two_do(pad_token: str, tmp_path: pathlib.Path) -> None:
    """As transformers 5 saves it."""
    vocabulary = clip_tokenizer(pad_token).vocabulary
    write_vocabulary(tmp_path, vocabulary)
    assert read_vocabulary(tmp_path) == vocabulary
    for name in OLD_FORM:
        (tmp_path / name).unlink()
    config = {
        "backend": "tokenizers",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "is_local": True,
        "model_max_length": 77,
        "pad_token": pad_token,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": "<|endoftext|>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert read_vocabulary(tmp_path) == vocabulary


def test_merges_may_be_texts_as_in_older_files(folder: pathlib.Path, vocabulary: Vocabulary) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    changed(folder, "tokenizer.json", model=model | {"merges": [" ".join(pair) for pair in model["merges"]]})
    for name in OLD_FORM:
        (folder / name).unlink()
    assert read_vocabulary(folder) == vocabulary


def test_without_a_config_it_is_clips(folder: pathlib.Path, vocabulary: Vocabulary) -> None:
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").unlink()
    read = read_vocabulary(folder)
    assert (read.ids, read.merges, read.marks) == (vocabulary.ids, vocabulary.merges, vocabulary.marks)
    assert read.max_length > 10**9, "the text encoder's length bounds it"


def test_files_from_before_2023_name_the_padding_in_a_map_of_marks(folder: pathlib.Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    changed(folder, "special_tokens_map.json", pad_token="!")
    (folder / "added_tokens.json").write_text(json.dumps({"<toy>": 600}))
    read = read_vocabulary(folder)
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    assert read.pad_token == theirs.pad_token == "!"
    assert read.added["<toy>"] == theirs.convert_tokens_to_ids("<toy>") == 600


def test_what_else_lies_in_the_folder_is_left_alone(folder: pathlib.Path, vocabulary: Vocabulary) -> None:
    (folder / "more").mkdir()
    (folder / "README.md").write_bytes(b"\xff")
    assert read_vocabulary(folder) == vocabulary


Damage = Callable[[pathlib.Path], Any]


def written(name: str, content: str | bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def edited(name: str, **values: Any) -> Damage:
    return lambda folder: changed(folder, name, **values)


def in_one_file(damage: Damage) -> Damage:
    def both(folder: pathlib.Path) -> None:
        for name in OLD_FORM:
            (folder / name).unlink()
        damage(folder)

    return both


def of_model(**values: Any) -> Damage:
    def change(folder: pathlib.Path) -> None:
        model = json.loads((folder / "tokenizer.json").read_text())["model"]
        changed(folder, "tokenizer.json", model=model | values)

    return in_one_file(change)


def cut(name: str, share: float) -> Damage:
    def change(folder: pathlib.Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(share * len(content))])

    return change


DAMAGES: dict[str, tuple[Damage, str]] = {
    "no folder": (shutil.rmtree, r"has no vocab\.json, nor a tokenizer\.json; is it the tokenizer/ of a diffusers dir"),
    "a number": (written("vocab.json", "5"), r"/vocab\.json cannot be read: a number, not an object; fetch it again"),
    "half a vocabulary": (cut("vocab.json", 0.5), r"/vocab\.json cannot be read: "),
    "bytes": (written("vocab.json", b"\xff\xfe"), r"/vocab\.json cannot be read: "),
    "nested without end": (written("vocab.json", "[" * 200_000), r"/vocab\.json cannot be read: "),
    "ids that are texts": (written("vocab.json", '{"a": "0"}'), r"'a' has the id '0'"),
    "ids that are negative": (written("vocab.json", '{"a": -1}'), r"'a' has the id -1"),
    "ids beyond all bounds": (written("vocab.json", '{"a": 99999999999999999999}'), r"'a' has the id 9999"),
    "half a character": (edited("vocab.json", **{"\ud83d": 599}), r"has the id 599"),
    "an id twice": (edited("vocab.json", **{"!": 1}), "two tokens have the same id"),
    "an empty vocabulary": (written("vocab.json", "{}"), "merges.txt is not whole: its vocabulary lacks"),
    "half the merges": (cut("merges.txt", 0.5), r"/merges\.txt is not whole"),
    "no merges": (written("merges.txt", ""), r"/merges\.txt is not whole: no merge makes"),
    "merges of one token": (
        written("merges.txt", "#version: 0.2\nabc\n"),
        r"not whole: \['abc'\] is no pair of tokens",
    ),
    "merges of three": (written("merges.txt", "#version: 0.2\na b c\n"), r"not whole: \['a', 'b', 'c'\] is no pair"),
    "merges of others": (written("merges.txt", "#version: 0.2\nq zz\n"), r"not whole: its vocabulary lacks 'zz'"),
    "merges that are bytes": (written("merges.txt", b"\xff\xfe"), r"merges\.txt cannot be read: it is not UTF-8"),
    "settings that are a list": (
        written("tokenizer_config.json", "[]"),
        r"_config\.json cannot be read: a list, not an object",
    ),
    "another class": (edited("tokenizer_config.json", tokenizer_class="T5Tokenizer"), r"another kind \(T5Tokenizer\)"),
    "a mark that is a number": (edited("tokenizer_config.json", eos_token=5), "its eos_token is 5"),
    "a mark that is not known": (edited("tokenizer_config.json", pad_token="<pad>"), "lacks '<pad>', its pad_token"),
    "no length": (edited("tokenizer_config.json", model_max_length=1), "model_max_length = 1, no length"),
    "a length that is none": (
        edited("tokenizer_config.json", model_max_length=None),
        "length = None, no length",
    ),
    "a length without end": (
        edited("tokenizer_config.json", model_max_length=float("inf")),
        "Infinity, which is",
    ),
    "a length that is no number": (
        edited("tokenizer_config.json", model_max_length=float("nan")),
        "NaN, which is",
    ),
    "added tokens of no ids": (edited("tokenizer_config.json", added_tokens_decoder={"a": {}}), "no map of ids"),
    "added tokens of no text": (edited("tokenizer_config.json", added_tokens_decoder={"1": {}}), "no map of ids"),
    "another file": (in_one_file(written("tokenizer.json", "{}")), r"tokenizer\.json cannot be read: it has no model"),
    "half a file": (in_one_file(cut("tokenizer.json", 0.5)), r"tokenizer\.json cannot be read: "),
    "another kind": (of_model(type="Unigram"), r"another kind \('Unigram', ends of words '</w>'\) than CLIP's"),
    "words without ends": (
        of_model(end_of_word_suffix=None),
        r"another kind \('BPE', ends of words None\) than CLIP",
    ),
    "no list of merges": (of_model(merges=5), "its model has no merges"),
    "merges that are numbers": (of_model(merges=[1, 2]), r"not whole: 1 is no pair of tokens"),
    "merges of numbers": (of_model(merges=[[1, 2]]), r"not whole: \[1, 2\] is no pair of tokens"),
    "no vocabulary": (of_model(vocab=[]), r"tokenizer\.json cannot be read: it holds no vocabulary"),
    "added tokens that are a number": (in_one_file(edited("tokenizer.json", added_tokens=5)), "no list of tokens"),
    "added tokens of numbers": (
        in_one_file(edited("tokenizer.json", added_tokens=[{"content": []}])),
        "no list of tok",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_told_in_a_line(name: str, folder: pathlib.Path) -> None:
    damage, words = DAMAGES[name]
    damage(folder)
    with pytest.raises(UserError, match=words) as raised:
        read_vocabulary(folder)
    assert "\n" not in str(raised.value) and str(raised.value).startswith(f"tokenizer: {folder}")


def test_gpt_2_has_such_files_too_and_is_refused(folder: pathlib.Path) -> None:
    """Its words have a mark of their beginning, not of their end."""
    ids = {"a": 0, "Ġ": 1, "Ġa": 2, "<|startoftext|>": 3, "<|endoftext|>": 4}
    (folder / "vocab.json").write_text(json.dumps(ids))
    (folder / "merges.txt").write_text("#version: 0.2\nĠ a\n")
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"of another kind than CLIP's tokenizer: no token ends a word \(</w>\)"):
        read_vocabulary(folder)
