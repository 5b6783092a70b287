"""Random PyTorch pipelines of each family: the published structure, as narrow as its heads and groups allow."""

import functools
import itertools
import json
import pathlib
import shutil
from typing import Any

import diffusers
import torch
import transformers
from ml_collections import ConfigDict
from PIL import Image

from offsetjax.config import default_config, presets
from offsetjax.data.build import build as build_pictures
from offsetjax.models.pipeline import build
from offsetjax.models.text import TextEncoder
from offsetjax.models.tokenizer import clip_tokenizer, save_tokenizer, train_tokenizer
from tests import tiny, torch_models

FAMILIES = ("sd1", "sd2", "sdxl")
_PRESETS = {
    "sd1": presets.stable_diffusion_1,
    "sd2": presets.stable_diffusion_2,
    "sdxl": presets.stable_diffusion_xl,
}
_TEXT = {"hidden_size": 64, "intermediate_size": 128, "projection_dim": 64, "num_attention_heads": 1}


def narrow_config(family: str) -> ConfigDict:
    """A config of the family's architecture, narrow; text encoders of 2 layers that know CLIP's vocabulary."""
    config = default_config()
    model = config.model
    _PRESETS[family](config)
    model.vae.block_out_channels = (32, 32, 64, 64)
    model.text_encoder.update(_TEXT, num_hidden_layers=23 if family == "sd2" else 2)
    model.unet.update(_unet(family))
    if family == "sdxl":
        # Of another width than the first, by which PyTorch's `from_single_file` tells them apart.
        model.text_encoder_2.update(
            hidden_size=128, intermediate_size=256, projection_dim=128, num_attention_heads=2, num_hidden_layers=2
        )
    return config


def _unet(family: str) -> dict[str, Any]:
    if family == "sd1":
        return {"block_out_channels": (32, 32, 64, 64), "cross_attention_dim": 64}
    if family == "sd2":
        widths = {"block_out_channels": (64, 64, 128, 128), "cross_attention_dim": 64}
        return {**widths, "attention_head_dim": (1, 1, 2, 2)}
    return {
        "block_out_channels": (64, 64, 128),
        "attention_head_dim": (1, 1, 2),
        "transformer_layers_per_block": (1, 1, 2),
        "cross_attention_dim": 64 + 128,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 128 + 6 * 8,
    }


def pipeline(config: ConfigDict, dtype: torch.dtype = torch.float32) -> diffusers.DiffusionPipeline:
    """PyTorch's pipeline of a config's architecture, with random weights."""
    parts = build(config)
    modules: dict[str, Any] = {
        part: _module(parts.parts[part], seed).to(dtype) for seed, part in enumerate(parts.family.parts)
    }
    pads = {"sd1": ("<|endoftext|>",), "sd2": ("!",), "sdxl": ("<|endoftext|>", "!")}[config.model.family]
    for place, pad in enumerate(pads):
        modules["tokenizer_2" if place else "tokenizer"] = torch_models.tokenizer(clip_tokenizer(pad))
    modules["scheduler"] = torch_models.scheduler(prediction_type=config.schedule.prediction_type)
    if config.model.family == "sdxl":
        return diffusers.StableDiffusionXLPipeline(
            **modules,
            force_zeros_for_empty_prompt=config.model.force_zeros_for_empty_prompt,
            add_watermarker=False,
        )
    return diffusers.StableDiffusionPipeline(
        **modules, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def _module(model: Any, seed: int) -> torch.nn.Module:
    config = model.torch_config()
    if isinstance(model, TextEncoder):
        module = getattr(transformers, model.class_name)(transformers.CLIPTextConfig(**config))
    else:
        module = getattr(diffusers, model.class_name).from_config(config)
    return torch_models.randomise(module, seed)


@functools.cache
def saved(base: pathlib.Path, family: str, dtype: str = "float32") -> pathlib.Path:
    """A diffusers directory that PyTorch wrote, once for all tests of a session; they must leave it as it is."""
    directory = base / f"{family}_{dtype}"
    pipeline(narrow_config(family), getattr(torch, dtype)).save_pretrained(directory)
    return directory


def save_tiny_xl(directory: pathlib.Path) -> None:
    """Writes an SDXL pipeline that compiles in seconds: two blocks, a learnt vocabulary, two small text encoders."""
    save_tokenizer(train_tokenizer(torch_models.CAPTIONS, 600, 12), directory / "words")
    words = directory / "words"
    second = {**torch_models.TEXT, "hidden_size": 32, "projection_dim": 32, "hidden_act": "gelu"}
    marks = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    unet = {
        "sample_size": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "attention_head_dim": (2, 4),
        "cross_attention_dim": 24 + 32,
        "norm_num_groups": 8,
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 32 + 6 * 8,
    }
    text_config, second_config = (
        transformers.CLIPTextConfig(**values, **marks) for values in (torch_models.TEXT, second)
    )
    diffusers.StableDiffusionXLPipeline(
        vae=torch_models.vae(scaling_factor=0.13025),
        text_encoder=torch_models.randomise(transformers.CLIPTextModel(text_config), 3),
        text_encoder_2=torch_models.randomise(transformers.CLIPTextModelWithProjection(second_config), 4),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(words),
        tokenizer_2=transformers.CLIPTokenizer.from_pretrained(words, pad_token="!"),
        unet=torch_models.randomise(diffusers.UNet2DConditionModel(**unet), 1),
        scheduler=torch_models.scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    ).save_pretrained(directory)
    shutil.rmtree(words)


SIZES = tuple(itertools.product((16, 20, 24, 28), (16, 20)))  # height, width of the pictures of `build_data`
LONG = " and ".join(["a boat on a lake"] * 20)  # more than the 77 tokens that the text encoders read


def build_data(folder: pathlib.Path) -> pathlib.Path:
    """A data set of a picture of each size; the caption of the second is too long."""
    source = folder / "pictures"
    source.mkdir(parents=True)
    lines = []
    for number, (height, width) in enumerate(SIZES):
        Image.new("RGB", (width, height), (30 * number, 0, 255 - 30 * number)).save(source / f"{number}.png")
        caption = LONG if number == 1 else tiny.CAPTIONS[number % len(tiny.CAPTIONS)]
        lines.append(json.dumps({"file_name": f"{number}.png", "text": caption}))
    (source / "metadata.jsonl").write_text("\n".join(lines))
    build_pictures(source, folder / "data")
    return folder / "data"
