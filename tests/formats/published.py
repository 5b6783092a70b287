"""Stable Diffusion 1, 2 and XL in PyTorch: the published architectures, and the same with few channels."""

from typing import Any

import diffusers
import ml_dtypes
import numpy as np
import torch
import transformers

from offsetjax.formats.tensors import Tensor, of_array
from tests import torch_models

Config = dict[str, Any]

FAMILIES = ("sd1", "sd2", "sdxl")
_ATTENTION_LAST = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
_ATTENTION_FIRST = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")


def configs(family: str, *, narrow: bool) -> dict[str, Config]:
    """The configuration of each part, as published, or with few channels and few of what there are many of."""
    is_xl = family == "sdxl"
    down = _ATTENTION_LAST if is_xl else _ATTENTION_FIRST
    widths = [32, 64, 128, 128] if narrow else [320, 640, 1280, 1280]
    widths = widths[: len(down)]
    first, second = (64, 128) if narrow else ({"sd1": 768, "sd2": 1024, "sdxl": 768}[family], 1280)
    context, added = first + second * is_xl, 8 if narrow else 256
    unet: Config = {
        "sample_size": 8,
        "down_block_types": list(down),
        "up_block_types": [kind.replace("Down", "Up") for kind in down[::-1]],
        "block_out_channels": widths,
        "layers_per_block": 2,
        "attention_head_dim": 8 if family == "sd1" else [max(width // 64, 1) for width in widths],
        "cross_attention_dim": context,
        "use_linear_projection": family != "sd1",
        "transformer_layers_per_block": ([1, 2, 3] if narrow else [1, 2, 10]) if is_xl else 1,
    }
    if is_xl:
        unet |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": added,
            "projection_class_embeddings_input_dim": second + 6 * added,
        }
    vae: Config = {
        "sample_size": 64,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [32, 64, 64, 64] if narrow else [128, 256, 512, 512],
        "layers_per_block": 2,
        "scaling_factor": 0.13025 if is_xl else 0.18215,
    }
    parts = {"unet": unet, "vae": vae, "text_encoder": _text(first, {"sd1": 12, "sd2": 23, "sdxl": 12}[family], narrow)}
    if family == "sd2":
        parts["text_encoder"]["hidden_act"] = "gelu"
    if is_xl:
        parts["text_encoder_2"] = _text(second, 2 if narrow else 32, narrow) | {"hidden_act": "gelu"}
    return parts


def _text(width: int, layers: int, narrow: bool) -> Config:
    return {
        "vocab_size": 100 if narrow else 49408,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "projection_dim": width,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
    }


def models(family: str, *, narrow: bool = True) -> dict[str, torch.nn.Module]:
    """The models of `configs`."""
    made = {}
    for part, config in configs(family, narrow=narrow).items():
        if part == "unet":
            made[part] = diffusers.UNet2DConditionModel(**config)
        elif part == "vae":
            made[part] = diffusers.AutoencoderKL(**config)
        else:
            kind = transformers.CLIPTextModelWithProjection if part == "text_encoder_2" else transformers.CLIPTextModel
            made[part] = kind(transformers.CLIPTextConfig(**config))
    return made


def random_models(family: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Module]:
    """The narrow models, with random weights of which no two are alike."""
    return {
        part: torch_models.randomise(model, seed).to(dtype) for seed, (part, model) in enumerate(models(family).items())
    }


def tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """A model's state dict as ours."""
    return {name: of_array(to_numpy(tensor)) for name, tensor in model.state_dict().items()}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor of any dtype, bit for bit."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.contiguous().numpy()


def abstract_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """The shapes of a model on the meta device: tensors that cannot be read."""

    def refuse(_: tuple[slice, ...]) -> np.ndarray:
        raise AssertionError("a tensor without values was read")

    return {
        name: Tensor(tuple(tensor.shape), np.dtype(np.float32), refuse) for name, tensor in model.state_dict().items()
    }
