"""Bad models and LoRAs at the command line: one line, exit status 2, nothing left behind."""

import os
import pathlib
import pickle
import re
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import safetensors.numpy

from offsetjax.models.trained import check_model
from tests import tiny, torch_models
from tests.damage import (
    SHARDS,
    TEXT,
    TEXT_2,
    UNET,
    VAE,
    Change,
    command,
    contents,
    copied,
    cut,
    empty_directory,
    in_its_place,
    in_variants,
    inpainting,
    pickled,
    refiner,
    refused,
    removed,
    renamed,
    save_good_models,
    sharded,
    with_header,
    with_json,
    with_tensors,
    written,
)

ROOT = pathlib.Path(__file__).parents[1]
OUTPUT, INPUT = "model.diffusion_model.out.2.bias", "model__diffusion_model__input_blocks__0__0__weight"
DECODER, TOKENS = "first_stage_model__decoder__conv_out__bias", "cond_stage_model__transformer__text_model__final"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3438167536\n"
SAVED = r"is a pickle, which can run code: convert it to safetensors, in PyTorch: .*safe_serialization=True"

# By name: which model, what is done to it, and words of the error.
MODELS: dict[str, tuple[str, Change, str]] = {
    **{
        f"a directory's file cut to {length}": ("sd1", cut(UNET, length), rf"{UNET} is damaged \(.*\); fetch it again")
        for length in (0, 7, 8, 100, 0.5, 0.999)
    },
    **{
        f"a single file cut to {length}": ("sd1.safetensors", cut("", length), r"model.safetensors is damaged \(")
        for length in (0, 7, 8, 100, 0.5, 0.999)
    },
    "autoencoder cut": ("sd1", cut(VAE, 0.5), rf"{VAE} is damaged \(it has \d+ bytes, not \d+\)"),
    "second text encoder cut": ("sdxl", cut(TEXT_2, 0.5), rf"{TEXT_2} is damaged"),
    "header of braces": ("sd1", with_header(UNET, b"{" * 99), rf"{UNET} is damaged"),
    "header of bytes": ("sd1", with_header(UNET, b"\xff" * 99), rf"{UNET} is damaged"),
    "header nested without end": ("sd1", with_header(UNET, b"[" * 99_999), rf"{UNET} is damaged"),
    "header of no length": ("sd1", written(UNET, b"\xff" * 99), r"its header would have \d+ bytes"),
    "name that leads up": ("sd1", renamed(UNET, "conv_in.bias", "../conv.bias"), r"'\.\./conv.bias' is no name of a"),
    "name with a slash": ("sd1", renamed(UNET, "conv_in.bias", "conv_in/bias"), "'conv_in/bias' is no name of a tens"),
    "name that leads up in a single file": (
        "sd1.safetensors",
        renamed("", OUTPUT, OUTPUT.replace("out.2", "../.2")),
        r"'model.diffusion_model.\.\./.2.bias' is no name of a tensor",
    ),
    "index that leads up": ("sd1", sharded(conv_in__bias="../x.safetensors"), "names '../x.safetensors', which is no"),
    "index that leads away": ("sd1", sharded(conv_in__bias="/x.safetensors"), "names '/x.safetensors', which is no fi"),
    "index of a pickle": ("sd1", sharded(conv_in__bias="x.bin"), "names 'x.bin', which is no file beside it"),
    "index of what is not there": ("sd1", sharded(more__bias=SHARDS[1]), r"is damaged \(more.bias is missing\)"),
    "index that is none": ("sd1", sharded(written(f"{UNET}.index.json", "{}")), "is no index of safetensors files"),
    "missing shard": (
        "sd1",
        sharded(removed(f"unet/{SHARDS[1]}")),
        r"-00002-of-00002.safetensors is missing, which .*index.json names; fetch it",
    ),
    "half a shard": ("sd1", sharded(cut(f"unet/{SHARDS[0]}", 0.5)), "-00001-of-.* is damaged"),
    **{
        f"no {file}": ("sd1", removed(file), f"{file} is missing; give a whole diffusers directory")
        for file in ("unet/config.json", "vae/config.json", "text_encoder/config.json")
    },
    "no schedule": ("sd1", removed("scheduler"), r"scheduler_config.json is missing; give a whole \w+ directory$"),
    "no index, no config": ("sd1", removed("model_index.json", "unet/config.json"), "unet/config.json is missing"),
    "no weights": ("sd1", removed(UNET), f"{UNET} is missing; fetch the whole directory"),
    "no tokenizer": ("sd1", removed("tokenizer"), "tokenizer has no vocab.json, nor a tokenizer.json; is it the"),
    "half a vocabulary": (
        "sd1",
        cut("tokenizer/vocab.json", 0.5),
        "tokenizer/vocab.json cannot be read: .*; fetch it again",
    ),
    "half the merges": ("sd1", cut("tokenizer/merges.txt", 0.5), "merges.txt is not whole: .*; fetch it again"),
    "tokenizer that is a list": (
        "sd1",
        written("tokenizer/tokenizer_config.json", "[]"),
        "tokenizer_config.json cannot be read",
    ),
    "tokenizer of another model": (
        "sd1",
        with_tensors(TEXT, text_model__embeddings__token_embedding__weight=np.zeros((520, 24), np.float32)),
        r"token_embedding.weight has shape \(520, 24\), not \(600, 24\)",
    ),
    "vocabulary beyond the text encoder's": (
        "sd1",
        with_json("text_encoder/config.json", vocab_size=500),
        r"text_encoder has a tokenizer of \d+ tokens, of which its encoder knows 500",
    ),
    **{
        f"no {folder} of SDXL": ("sdxl", removed(folder), words)
        for folder, words in {
            "text_encoder": "text_encoder/config.json is missing; give a whole diffusers directory",
            "text_encoder_2": "text_encoder_2/config.json is missing; give a whole diffusers directory",
            "tokenizer_2": "tokenizer_2 has no vocab.json",
        }.items()
    },
    "config that is half written": ("sd1", cut("unet/config.json", 0.5), r"unet/config.json is no configuration \("),
    "config of texts": (
        "sd1",
        with_json("unet/config.json", layers_per_block="two"),
        "unet has layers_per_block = 'tw",
    ),
    "config of other blocks": (
        "sd1",
        with_json("unet/config.json", down_block_types=["A", "B"]),
        r"unet has down_block_types = \('A', 'B'\), which must be made of CrossAttnDownBlock2D, DownBlock2D",
    ),
    "config of a block in another case": (
        "sd1",
        with_json("unet/config.json", down_block_types=["CrossAttnDownBlock2d", "DownBlock2D"]),
        "did you mean 'CrossAttnDownBlock2D'",
    ),
    "config of no heads": (
        "sd1",
        with_json("text_encoder/config.json", num_attention_heads=0),
        "text_encoder has num_attention_heads = 0, which must be at least 1",
    ),
    "config of billions of layers": (
        "sd1",
        with_json("text_encoder/config.json", num_hidden_layers=2**31),
        "text_encoder has num_hidden_layers = 2147483648, which must be at least 1",
    ),
    "EDM": (
        "sd1",
        with_json("scheduler/scheduler_config.json", _class_name="EDMEulerScheduler"),
        "scheduler has _class_name = 'EDMEulerScheduler', which is not supported",
    ),
    "autoencoder of other latents": (
        "sd1",
        lambda model: torch_models.vae(latent_channels=8).save_pretrained(model / "vae"),
        "model.unet.out_channels = 4 must be 8, the model.vae.latent_channels",
    ),
    "autoencoder of other pictures": (
        "sd1",
        lambda model: torch_models.vae(in_channels=4, out_channels=4).save_pretrained(model / "vae"),
        "model.vae.out_channels must be 3: red, green and blue",
    ),
    "other activation": (
        "sd1",
        with_json("text_encoder/config.json", hidden_act="relu"),
        "has hidden_act = 'relu', wh",
    ),
    "nothing there": (
        "sd1",
        in_its_place("none"),
        "none is neither a diffusers directory nor a .safetensors file; to f",
    ),
    "empty directory": (
        "sd1",
        empty_directory,
        "holds none of unet, vae, text_encoder, text_encoder_2; is it a diffus",
    ),
    "no file": ("sd1", in_its_place("nothing.safetensors"), "nothing.safetensors is missing"),
    "one folder": ("sd1", lambda model: model / "unet", "unet holds none of unet, vae, text_encoder, text_encoder_2"),
    "one part": ("sd1", lambda model: model / UNET, "is one part of a diffusers directory; give the directory"),
    "text file": ("sd1", in_its_place("model.txt", b"a cat"), "is neither a diffusers directory nor a .safetensors f"),
    "web page": ("sd1", in_its_place("m.safetensors", b"<html>" * 99), "m.safetensors is damaged"),
    "pointer of Git LFS": ("sd1", in_its_place("m.safetensors", LFS), "is a pointer of Git LFS.*git lfs pull"),
    **{
        f"pickle under another name: {data!r}": (
            "sd1",
            in_its_place("m.safetensors", data),
            "m.safetensors is a pickle, which can run code, whatever its name; fetch it as safetensors, or convert it",
        )
        for data in (
            b"PK\x03\x04" + bytes(99) + b"\x01",
            b"PK\x03\x04\x00\x00\x08\x08" + b"m/data.pkl" * 9,
            pickle.dumps({"a": 1}),
        )
    },
    "pickle of the denoiser under another name": ("sd1", written(UNET, pickle.dumps([])), f"{UNET} is a pickle, which"),
    "pickle": ("sd1", in_its_place("m.ckpt", b"PK\x03\x04"), rf"m.ckpt {SAVED}"),
    "pickled denoiser": (
        "sd1",
        pickled("unet", "diffusion_pytorch_model.bin"),
        rf"diffusion_pytorch_model.bin {SAVED}",
    ),
    "pickled text encoder": ("sd1", pickled("text_encoder", "pytorch_model.bin"), rf"pytorch_model.bin {SAVED}"),
    "other pipeline": ("sd1", with_json("model_index.json", _class_name="FluxPipeline"), "is a FluxPipeline, which is"),
    "refiner": ("sdxl", refiner, "is the refiner of SDXL, which is not one of the supported families"),
    "refiner in a single file": ("sdxl.safetensors", refiner, "is the refiner of SDXL"),
    "inpainting": ("sd1", inpainting(UNET, "conv_in__weight"), "has a denoiser of 9 input channels, for inpainting"),
    "inpainting in a single file": ("sd1.safetensors", inpainting("", INPUT), "has a denoiser of 9 input channels"),
    "LoRA": ("sd1_lora.safetensors", lambda model: None, "is a LoRA, not a model; give it as lora.pretrained"),
    **{
        f"{what} tensor of {file.split('/')[0]}": (
            kind,
            with_tensors(file, **{name if what != "extra" else "more__weight": value}),
            rf"model: {file.split('/')[0]}: {name.replace('__', '.') if what != 'extra' else 'more.weight'} {words}",
        )
        for kind, file, name in (
            ("sd1", UNET, "conv_out__bias"),
            ("sd1", VAE, "decoder__conv_out__bias"),
            ("sd1", TEXT, "text_model__final_layer_norm__bias"),
            ("sdxl", TEXT_2, "text_projection__weight"),
        )
        for what, value, words in (
            ("missing", None, "is missing"),
            ("extra", np.zeros(3, np.float32), "is not part of the model"),
            ("misshapen", np.zeros((3, 5, 7), np.float32), r"has shape \(3, 5, 7\), not \("),
        )
    },
    "integers for weights": (
        "sd1",
        with_tensors(UNET, conv_out__bias=np.zeros(4, np.int64)),
        "conv_out.bias holds int64, not numbers with a floating point",
    ),
    "missing tensor of a single file": (
        "sd1.safetensors",
        with_tensors("", first_stage_model__encoder__conv_in__weight=None),
        "model.safetensors: first_stage_model.encoder.conv_in.weight is missing; is it a whole model",
    ),
    "extra tensor of a single file": (
        "sd1.safetensors",
        with_tensors("", more__weight=np.zeros(3, np.float32)),
        "more.weight is not part of the model; is it a whole model",
    ),
    "misshapen tensor of a single file's autoencoder": (
        "sd1.safetensors",
        with_tensors("", **{DECODER: np.zeros((3, 5, 7), np.float32)}),
        r"vae: decoder.conv_out.bias has shape \(3, 5, 7\), not \(3,\)",
    ),
    "misshapen tensor of a single file's text encoder": (
        "sd1.safetensors",
        with_tensors("", **{f"{TOKENS}_layer_norm__bias": np.zeros(5, np.float32)}),
        r"text_encoder: text_model.final_layer_norm.bias has shape \(5,\), not \(24,\)",
    ),
    "two variants": ("sd1", in_variants, "unet has the variants ema, fp16; name one in model.variant"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    data = tiny.data_path(tmp_path_factory.getbasetemp())
    return save_good_models(tmp_path_factory.mktemp("good"), data)


def test_the_models_themselves_are_good(base: pathlib.Path) -> None:
    """So that what is refused below is refused for what was done to it."""
    for model in ("sd1", "sdxl", "sd1.safetensors"):
        check_model(base / model)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("action", ["train", "sample"])
def test_a_bad_model_is_refused(
    action: str, name: str, base: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, change, words = MODELS[name]
    model = copied(base / kind, tmp_path)
    model = change(model) or model
    before = contents(tmp_path)
    line = refused(capsys, *command(action, base, tmp_path, model))
    assert re.search(words, line), line
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("file", "tensor", "words"),
    [
        (UNET, "conv_in__bias", "unet/conv_in/bias has values that are not finite; give another model"),
        (TEXT, "text_model__final_layer_norm__bias", "text_encoder: text_model.final_layer_norm.bias has values that"),
    ],
    ids=["trained", "frozen"],
)
def test_weights_that_are_not_finite_are_refused(
    file: str, tensor: str, words: str, base: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = copied(base / "sd1", tmp_path)
    with_tensors(file, **{tensor: lambda array: np.full_like(array, np.inf)})(model)
    line = refused(capsys, *command("train", base, tmp_path, model))
    assert words in line, line
    assert not list(tmp_path.rglob("metrics.jsonl")) and not list(tmp_path.rglob("checkpoints/[0-9]*"))


def in_base(path: str) -> Callable[[pathlib.Path, pathlib.Path], str]:
    return lambda base, folder: str(base / path)


def lora_with(data: Callable[[bytes], bytes], name: str = "lora.safetensors") -> Callable[..., str]:
    """The good LoRA of SD 1 with its bytes changed."""

    def make(base: pathlib.Path, folder: pathlib.Path) -> str:
        (folder / name).write_bytes(data((base / "sd1_lora.safetensors").read_bytes()))
        return str(folder / name)

    return make


# By name: which model, which LoRA, and words of the error.
LORAS: dict[str, tuple[str, Callable[[pathlib.Path, pathlib.Path], str], str]] = {
    "a model": ("sd1", in_base("sd1.safetensors"), "holds no adapters; is it a model. Give that as model.pretrained"),
    "a part of a model": ("sd1", in_base(f"sd1/{UNET}"), "holds no adapters; is it a model. Give that as model.pretra"),
    "a directory": ("sd1", in_base("sd1"), "sd1 is a directory, not a safetensors file"),
    "nothing": ("sd1", in_base("none.safetensors"), "none.safetensors is missing"),
    "SDXL's": ("sd1", in_base("sdxl_lora.safetensors"), "is of no layer of the model.* for another family than sd1"),
    "SD 1's": ("sdxl", in_base("sd1_lora.safetensors"), "is of no layer of the model.* for another family than sdxl"),
    "cut": ("sd1", lora_with(lambda data: data[: len(data) // 2]), "lora.safetensors is damaged"),
    "of other layers": (
        "sd1",
        lora_with(lambda data: data.replace(b"mid_block_attentions_0_", b"mid_block_attentions_9_", 1)),
        "is of no layer of the model",
    ),
    "text": ("sd1", lora_with(lambda data: b"a cat, not a LoRA", "lora.txt"), "lora.txt is damaged"),
    "pickled": (
        "sd1",
        lora_with(lambda data: b"PK\x03\x04", "lora.pt"),
        "lora.pt is a pickle.* convert it to safetens",
    ),
    "pickled under another name": ("sd1", lora_with(lambda data: b"PK\x03\x04"), "lora.safetensors is a pickle"),
}


@pytest.mark.parametrize("name", LORAS)
@pytest.mark.parametrize("action", ["train", "sample"])
def test_a_bad_lora_is_refused(
    action: str, name: str, base: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, make, words = LORAS[name]
    lora = make(base, tmp_path)
    before = contents(tmp_path)
    field = "--config.lora.pretrained" if action == "train" else "--lora"
    line = refused(capsys, *command(action, base, tmp_path, base / kind, f"{field}={lora}"))
    assert re.search(words, line), line
    assert line.startswith("offsetjax: error: lora.pretrained: ") and len(line) < 1000
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("sd1", ("model.family=sdxl",), r"model.family = 'sdxl', but .*sd1 is a Stable Diffusion 1.x model \(sd1\)"),
        (
            "sdxl.safetensors",
            ("model.family=sd2",),
            "model.family = 'sd2', but .*sdxl.safetensors is a Stable Diffusion",
        ),
        (
            "sd1",
            ("model.unet.block_out_channels=(8,16)",),
            r"but .* has \(16, 32\); set it to that, or leave it out, or add unet to",
        ),
        (
            "sd1",
            ("schedule.prediction_type=v_prediction",),
            "but .* has 'epsilon'; set it to that, or leave it out, or add unet to",
        ),
        ("sd1", ("model.variant=fp16",), "has no weights 'fp16'; it has the plain files"),
        ("sd1.safetensors", ("model.variant=fp16",), "'fp16' cannot apply to .*, which is one file; leave it out"),
        (
            "sd1",
            ("lora.rank=2", "lora.targets=('to_qq','to_k')"),
            "no layer's name ends in 'to_qq'; did you mean to_q ",
        ),
        ("sd1", ("lora.rank=2", "lora.targets=('norm1',)"), "no layer's name ends in 'norm1'; give the ends of"),
        ("sd1", ("lora.rank=2", "lora.targets=()"), "lora.targets is empty; name layers"),
        (
            "sd1",
            ("lora.rank=2", "lora.text_encoder_targets=('to_q',)", "train.text_encoders=true"),
            "lora.text_encoder_targets: no layer's name ends in 'to_q'",
        ),
        ("sd1", ("lora.alpha=4.0",), "lora.alpha cannot apply with lora.rank = 0.*; set lora.rank"),
        ("sd1", ("lora.targets=('to_q',)",), "lora.targets cannot apply with lora.rank = 0"),
        ("sd1", ("lora.rank=-1",), "lora.rank = -1 must be at least 0"),
        ("sd1", ("task=autoencoder", "lora.rank=2"), "lora.rank cannot apply to task = 'autoencoder'"),
        (
            "sd1",
            ("data.resolution=18",),
            "data.resolution = 18 must be a multiple of 4, which the blocks of vae and unet",
        ),
        (
            "sd1",
            ("model.pretrained=", "model.from_scratch=('unet',)"),
            "model.from_scratch cannot apply without model.p",
        ),
        (
            "sd1",
            ("model.from_scratch=('scheduler',)",),
            "model.from_scratch = .* must be made of unet, vae, text_encoder",
        ),
    ],
)
def test_a_setting_that_does_not_go_with_the_model_is_refused(
    kind: str,
    settings: tuple[str, ...],
    words: str,
    base: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = [f"--config.{setting}" for setting in settings]
    line = refused(capsys, *command("train", base, tmp_path, base / kind, *more))
    assert re.search(words, line), line
    assert contents(tmp_path) == {}


def test_a_loras_own_rank_is_not_contradicted(
    base: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = (f"--config.lora.pretrained={base}/sd1_lora.safetensors", "--config.lora.rank=3")
    line = refused(capsys, *command("train", base, tmp_path, base / "sd1", *more))
    assert "lora.rank = 3, but " in line and "has others; train with its own: --config.lora.rank=2" in line


HEADERS = {
    "no JSON": ({"offsetjax.noise": "{"}, r"its header says of its noise cannot be read \(.*\); export it again"),
    "a list": ({"offsetjax.noise": "[1]"}, "its header says of its noise cannot be read"),
    "a text": ({"offsetjax.noise": '{"offset_strength": "a"}'}, "its header says of its noise cannot be read"),
    "no number": ({"offsetjax.noise": '{"offset_strength": NaN}'}, "its header says of its noise cannot be read .*NaN"),
    "negative": ({"offsetjax.noise": '{"offset_strength": -1}'}, r"noise.offset_strength = -1\.0 must be at least 0"),
    "code": ({"offsetjax.noise": '{"kind": "spectral", "spectrum": ["exit()"]}'}, "'exit()' is no formula of f"),
    "odd size": ({"offsetjax.noise": "{}", "modelspec.resolution": "18x18"}, "resolution = 18 must be a multiple of 4"),
    "no size": ({"offsetjax.noise": "{}", "modelspec.resolution": "0x0"}, "data.resolution = 0 must be at least 8"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_describes_no_noise_is_refused(
    name: str, base: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = copied(base / "sd1", tmp_path)
    header, words = HEADERS[name]
    safetensors.numpy.save_file(safetensors.numpy.load_file(model / UNET), model / UNET, header)
    before = contents(tmp_path)
    line = refused(capsys, *command("sample", base, tmp_path, model))
    assert re.search(words.replace("exit()", r"exit\(\)"), line), line
    assert contents(tmp_path) == before


@pytest.mark.parametrize("action", ["train", "sample"])
def test_a_process_says_one_line_and_exits_with_2(action: str, base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    model = copied(base / "sd1", tmp_path)
    cut(UNET, 0.5)(model)
    before = contents(tmp_path)
    arguments = [sys.executable, "-m", "offsetjax", *command(action, base, tmp_path, model)]
    done = subprocess.run(arguments, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    *logged, error = done.stderr.splitlines()
    assert error.startswith("offsetjax: error: model.pretrained: ") and error.endswith("; fetch it again")
    assert len(logged) == (1 if action == "train" else 0), done.stderr  # the digest of the config
    assert contents(tmp_path) == before
