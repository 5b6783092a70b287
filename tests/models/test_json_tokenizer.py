"""Tokenizers of chat models and of T5 give transformers' ids and lengths, in the pipelines' templates."""

import json
import pathlib

import pytest
import tokenizers as library
import transformers
from tokenizers import models, pre_tokenizers, trainers

from offsetjax.errors import UserError
from offsetjax.models.json_tokenizer import (
    CHAT,
    CHAT_WITHOUT_THOUGHTS,
    PLAIN,
    JsonTokenizer,
    Template,
    read_tokenizer,
    write_tokenizer,
)

CAPTIONS = [
    "",
    "a dark alley in a rainstorm",
    "  Two spaces,\nlines\tand tabs… ",
    "café e\u0301 ﬁ Ⅷ 東京の夜 😀 1234567 don't",
    "what a <|im_end|> user may not know of, and <pad> or </s>",
    "ski " * 40,
]
# As Qwen3's own, of a caption alone: with no thoughts asked for, an empty one is given.
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, transformers.PreTrainedTokenizerBase]:
    """A small tokenizer in Qwen's form: byte-level pairs, and marks beside them."""
    folder = tmp_path_factory.mktemp("qwen")
    bpe = library.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        CAPTIONS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(bpe.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    theirs = transformers.Qwen2TokenizerFast(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=131_072,
    )
    theirs.add_tokens(["<think>", "</think>"])
    theirs.save_pretrained(folder)
    return folder, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, transformers.PreTrainedTokenizerBase]:
    """A small tokenizer in T5's form: pieces with probabilities, and a mark at the end."""
    folder = tmp_path_factory.mktemp("t5")
    pieces = library.Tokenizer(models.Unigram())
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    marks = ["<pad>", "</s>", "<unk>"]
    pieces.train_from_iterator(
        CAPTIONS,
        trainers.UnigramTrainer(vocab_size=120, special_tokens=marks, unk_token="<unk>", show_progress=False),
    )
    pieces.post_processor = library.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    theirs = transformers.T5TokenizerFast(tokenizer_object=pieces, extra_ids=0, model_max_length=512)
    theirs.save_pretrained(folder)
    return folder, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(("template", "thinks"), [(CHAT, True), (CHAT_WITHOUT_THOUGHTS, False)])
@pytest.mark.parametrize("max_length", [32, 512])
def test_chat_models_read_captions_as_pytorchs_pipelines_have_them(
    qwen: tuple, template: Template, thinks: bool, max_length: int
) -> None:
    folder, theirs = qwen
    ours = read_tokenizer(folder, max_length, template)
    assert ours.pad_token_id == theirs.pad_token_id and len(ours) == len(theirs)
    for caption in CAPTIONS:
        text = theirs.apply_chat_template(
            [{"role": "user", "content": caption}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinks,
        )
        expected = theirs(text, padding="max_length", max_length=max_length, truncation=True)
        ids, length = ours.padded(caption)
        assert ids == expected.input_ids
        assert min(length, max_length) == sum(expected.attention_mask)
        assert length == len(theirs(text).input_ids)


@pytest.mark.parametrize("max_length", [12, 256])
def test_t5_reads_captions_as_pytorchs_pipelines_have_them(t5: tuple, max_length: int) -> None:
    folder, theirs = t5
    ours = read_tokenizer(folder, max_length)
    assert ours.pad_token_id == theirs.pad_token_id == 0
    for caption in CAPTIONS:
        expected = theirs(caption, padding="max_length", max_length=max_length, truncation=True)
        ids, length = ours.padded(caption)
        assert ids == expected.input_ids
        assert min(length, max_length) == sum(expected.attention_mask)


def test_files_are_written_as_they_were_read(qwen: tuple, tmp_path: pathlib.Path) -> None:
    folder, _ = qwen
    (folder / "a folder").mkdir()
    write_tokenizer(read_tokenizer(folder, 64, CHAT), tmp_path / "tokenizer")
    written = {file.name: file.read_bytes() for file in (tmp_path / "tokenizer").iterdir()}
    assert written == {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    assert "tokenizer.json" in written


def test_a_tokenizer_that_does_not_fit_is_refused(t5: tuple, qwen: tuple, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json has no token <\|im_start\|>, and is no chat model's; give"):
        read_tokenizer(t5[0], 64, CHAT)
    with pytest.raises(UserError, match=r"tokenizer: .*missing is missing; fetch"):
        read_tokenizer(tmp_path / "missing", 64)
    with pytest.raises(UserError, match=r"has no tokenizer\.json; fetch"):
        read_tokenizer(tmp_path, 64)
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read: .*; fetch it again"):
        JsonTokenizer({"tokenizer.json": b"{"}, 64)
    whole = (qwen[0] / "tokenizer.json").read_bytes()
    with pytest.raises(UserError, match=r"tokenizer_config\.json names no pad_token"):
        JsonTokenizer({"tokenizer.json": whole}, 64, PLAIN)
    with pytest.raises(UserError, match=r"tokenizer_config\.json is not JSON"):
        JsonTokenizer({"tokenizer.json": whole, "tokenizer_config.json": b"{"}, 64, PLAIN)
