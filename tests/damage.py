"""Good models, what can be wrong with them, and how the command says so."""

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from offsetjax.cli import main
from offsetjax.config import default_config
from offsetjax.formats.lora import write_lora
from offsetjax.formats.pretrained import open_pretrained
from offsetjax.formats.safetensors import write_tensors
from offsetjax.formats.single_file import to_original
from offsetjax.models.family import family_of
from offsetjax.models.lora import init_adapters
from offsetjax.models.pipeline import build
from offsetjax.models.resolve import resolve
from offsetjax.models.weights import abstract_params
from offsetjax.rng import stream_key
from tests import families, torch_models

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT, TEXT_2 = "text_encoder/model.safetensors", "text_encoder_2/model.safetensors"
SHARDS = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
CONFIG = """
from offsetjax.config import default_config


def get_config():
    config = default_config()
    config.data.path, config.data.resolution = {data!r}, 16
    config.train.steps, config.model.dtype = 1, "float32"
    config.optimizer.ema_decay, config.sample.params, config.sample.every_steps = 0.0, "raw", 0
    return config
"""
Change = Callable[[pathlib.Path], Any]  # of a copy of a model; may give another path in its place


def save_good_models(base: pathlib.Path, data: pathlib.Path) -> pathlib.Path:
    """Good models of every kind, two LoRAs and a config file to train them."""
    torch_models.save_pipeline(base / "sd1")
    families.save_tiny_xl(base / "sdxl")
    # What a single file does not say has the family's values: CLIP's vocabulary, groups of 32.
    wide = {"block_out_channels": (32, 64), "norm_num_groups": 32}
    text_encoder = torch_models.text_encoder(vocab_size=49408, max_position_embeddings=77)
    parts = {"unet": torch_models.unet(**wide), "vae": torch_models.vae(**wide), "text_encoder": text_encoder}
    torch_models.save_pipeline(base / "wide", **parts)
    write_single(base / "wide", base / "sd1.safetensors")
    write_single(base / "sdxl", base / "sdxl.safetensors")
    for kind in ("sd1", "sdxl"):
        write_adapters(base / kind, base / f"{kind}_lora.safetensors")
    (base / "config.py").write_text(CONFIG.format(data=str(data)))
    return base


def write_single(directory: pathlib.Path, file: pathlib.Path) -> None:
    """A single file as another program may write it, of a model whose heads and groups such a file does not say."""
    model = open_pretrained(directory)
    parts = [part for part in ("unet", "vae", "text_encoder", "text_encoder_2") if model.has(part)]
    configs = {part: model.read_config(part) for part in (*parts, "scheduler")}
    tensors = to_original({part: model.tensors(part) for part in parts}, configs, model.family)
    write_tensors(file, tensors, metadata={"format": "pt"})


def write_adapters(directory: pathlib.Path, file: pathlib.Path) -> None:
    config = default_config()
    config.model.pretrained = str(directory)
    config = resolve(config)
    like = abstract_params(build(config).denoiser)
    adapters = init_adapters(stream_key(0, "test"), like, ("to_q",), 2)
    family = family_of(config.model)
    names = {"family": family.name, "kohya": family.files.kohya}
    write_lora(file, {"unet": adapters}, base_like={"unet": like}, **names, rank=2, alpha=2.0)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the command says."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("offsetjax: error: ")
    return lines[0]


def contents(folder: pathlib.Path) -> dict[str, Any]:
    """Every file, folder and link, with the bytes of files."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def copied(original: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    copy = folder / f"model{original.suffix}"
    return pathlib.Path((shutil.copyfile if original.is_file() else shutil.copytree)(original, copy))


def command(name: str, base: pathlib.Path, folder: pathlib.Path, model: pathlib.Path | str, *more: str) -> list[str]:
    """`train` or `sample` with a model; what is written would lie in `folder`."""
    if name == "train":
        arguments = (f"--config={base}/config.py", f"--workdir={folder}/run", f"--config.model.pretrained={model}")
    else:
        arguments = (f"--model={model}", "--prompt=a", f"--out={folder}/out")
    return [name, *arguments, *more]


# Changes of a good model.


def cut(file: str, length: float) -> Change:
    """Leaves so many of a file's bytes, or such a share of them."""

    def change(model: pathlib.Path) -> None:
        data = (model / file).read_bytes()
        (model / file).write_bytes(data[: int(length if isinstance(length, int) else length * len(data))])

    return change


def renamed(file: str, old: str, new: str) -> Change:
    """Gives a tensor a name of the same length."""

    def change(model: pathlib.Path) -> None:
        data = (model / file).read_bytes()
        assert len(old) == len(new) and f'"{old}"'.encode() in data
        (model / file).write_bytes(data.replace(f'"{old}"'.encode(), f'"{new}"'.encode()))

    return change


def written(file: str, data: bytes | str) -> Change:
    return lambda model: (model / file).write_bytes(data if isinstance(data, bytes) else data.encode()) and None


def removed(*files: str) -> Change:
    def change(model: pathlib.Path) -> None:
        for file in files:
            (shutil.rmtree if (model / file).is_dir() else pathlib.Path.unlink)(model / file)

    return change


def with_header(file: str, header: bytes) -> Change:
    """Puts other bytes in the place of the header."""

    def change(model: pathlib.Path) -> None:
        data = (model / file).read_bytes()
        rest = data[8 + int.from_bytes(data[:8], "little") :]
        (model / file).write_bytes(len(header).to_bytes(8, "little") + header + rest)

    return change


def with_json(file: str, **values: Any) -> Change:
    def change(model: pathlib.Path) -> None:
        (model / file).write_text(json.dumps(json.loads((model / file).read_text()) | values))

    return change


def with_tensors(file: str, **tensors: Any) -> Change:
    """Puts tensors in; None takes one out, a function takes what is there (names have `__` for the dot)."""

    def change(model: pathlib.Path) -> None:
        found = safetensors.numpy.load_file(model / file)
        for key, value in tensors.items():
            name = key.replace("__", ".")
            if value is None:
                del found[name]
            else:
                found[name] = value(found[name]) if callable(value) else np.asarray(value)
        safetensors.numpy.save_file(found, model / file)

    return change


def sharded(*changes: Change, **weight_map: Any) -> Change:
    """Splits the denoiser's weights over two files with an index, in which `weight_map` replaces entries."""

    def change(model: pathlib.Path) -> None:
        found = safetensors.numpy.load_file(model / UNET)
        index: dict[str, Any] = {name: SHARDS[2 * place // len(found)] for place, name in enumerate(sorted(found))}
        for file in SHARDS:
            shard = {name: tensor for name, tensor in found.items() if index[name] == file}
            safetensors.numpy.save_file(shard, model / "unet" / file)
        index |= {name.replace("__", "."): value for name, value in weight_map.items()}
        (model / f"{UNET}.index.json").write_text(json.dumps({"weight_map": index}))
        (model / UNET).unlink()
        for further in changes:
            further(model)

    return change


def pickled(part: str, name: str) -> Change:
    """Only a pickle is there of a part's weights."""

    def change(model: pathlib.Path) -> None:
        next((model / part).glob("*.safetensors")).rename(model / part / name)

    return change


def in_variants(model: pathlib.Path) -> None:
    """The denoiser's weights are there twice, and neither is the plain one."""
    for variant in ("fp16", "ema"):
        shutil.copyfile(model / UNET, (model / UNET).with_suffix(f".{variant}.safetensors"))
    (model / UNET).unlink()


def refiner(model: pathlib.Path) -> None:
    """SDXL's refiner has the second text encoder alone: as the only one."""
    if model.is_dir():
        removed("text_encoder")(model)
        index = {"_class_name": "StableDiffusionXLImg2ImgPipeline", "text_encoder": [None, None]}
        with_json("model_index.json", **index)(model)
        return
    found = safetensors.numpy.load_file(model)
    kept = {name: tensor for name, tensor in found.items() if "embedders.0" not in name}
    safetensors.numpy.save_file({name.replace("embedders.1", "embedders.0"): kept[name] for name in kept}, model)


def inpainting(file: str, name: str) -> Change:
    """A denoiser that also takes a mask and a masked picture."""

    def change(model: pathlib.Path) -> None:
        with_tensors(file, **{name: lambda weight: np.concatenate([weight, weight, weight[:, :1]], 1)})(model)
        if model.is_dir():
            with_json("unet/config.json", in_channels=9)(model)

    return change


def in_its_place(name: str, data: bytes | None = None) -> Change:
    """Another path; None: nothing is there."""

    def change(model: pathlib.Path) -> pathlib.Path:
        if data is not None:
            (model.parent / name).write_bytes(data)
        return model.parent / name

    return change


def empty_directory(model: pathlib.Path) -> pathlib.Path:
    (model.parent / "empty").mkdir()
    return model.parent / "empty"
