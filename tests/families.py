"""Random PyTorch pipelines of each family: the published structure, as narrow as its heads and groups allow."""

import functools
import pathlib
from typing import Any

import diffusers
import torch
import transformers
from ml_collections import ConfigDict

from offsetjax import presets
from offsetjax.config import default_config
from offsetjax.models.pipeline import build
from offsetjax.models.text import TextEncoder
from offsetjax.models.tokenizer import clip_tokenizer
from tests import torch_models

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
        part: _module(getattr(parts, part), seed).to(dtype)
        for seed, part in enumerate(("unet", "vae", *parts.text_encoders))
    }
    pads = {"sd1": ("<|endoftext|>",), "sd2": ("!",), "sdxl": ("<|endoftext|>", "!")}[config.model.family]
    for place, pad in enumerate(pads):
        modules["tokenizer_2" if place else "tokenizer"] = clip_tokenizer(pad)
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
