"""The configurations, in diffusers' names, of a file in the original layout, which holds none.

Widths and numbers of layers are read off the shapes. The rest is what all models of a family have: the width of an
attention's head, the activation, the schedule.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from offsetjax.diffusion.flow import stored_scheduler
from offsetjax.diffusion.variance_preserving import latent_side
from offsetjax.errors import UserError
from offsetjax.formats.original_names import UNET, VAE
from offsetjax.formats.tensors import Tensor

Config = dict[str, Any]

TEXT_PREFIXES = {
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}
SD2_TEXT_LAYERS = 23  # of OpenCLIP's ViT-H those that count
# The standard deviation of one bias in the last block is above this in 2.x models that predict v, and below in those
# that predict ε: all that distinguishes them where neither the header nor a marker does (ComfyUI goes by it).
_VELOCITY_BIAS = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
_VELOCITY_DEVIATION = 0.09


_REMEDY = "use --format=diffusers"
# What no network depends on, or is of diffusers and transformers alone.
_UNSAID = {"_class_name", "architectures", "sample_size", "bos_token_id", "eos_token_id", "pad_token_id", "model_type"}
_OF_SCHEDULE = {
    *("beta_start", "beta_end", "beta_schedule", "num_train_timesteps"),
    *("prediction_type", "rescale_betas_zero_snr"),
}


class _Shapes(dict[str, tuple[int, ...]]):
    """The shapes of one part by name without the part's prefix; a missing name is reported with the prefix."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str):
        self._prefix = prefix
        super().__init__((name.removeprefix(prefix), t.shape) for name, t in tensors.items() if name.startswith(prefix))

    def __missing__(self, name: str) -> tuple[int, ...]:
        raise KeyError(self._prefix + name)


def is_open_clip(part: str, family: str) -> bool:
    """Whether a text encoder is OpenCLIP's; the others are CLIP's."""
    return TEXT_PREFIXES[family][part].endswith(".model.")


def configs_of(tensors: Mapping[str, Tensor], header: Mapping[str, str], family: str) -> dict[str, dict[str, Any]]:
    """The configurations of the parts that the file has, of the scheduler and of the pipeline."""
    found = {"unet": unet_config(tensors, family)}
    if any(name.startswith(VAE) for name in tensors):
        found["vae"] = vae_config(tensors, family)
    for part, prefix in TEXT_PREFIXES[family].items():
        if any(name.startswith(prefix) for name in tensors):
            found[part] = text_config(tensors, part, family)
    scheduler = scheduler_config(tensors, header, family)
    size = latent_size(header, scheduler["prediction_type"], family)
    found["unet"]["sample_size"] = size
    if "vae" in found:
        found["vae"]["sample_size"] = size * 2 ** (len(found["vae"]["block_out_channels"]) - 1)
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline"}
    if family == "sdxl":
        index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    return found | {"scheduler": scheduler, "model_index": index}


def check_said(
    tensors: Mapping[str, Tensor], header: Mapping[str, str], configs: Mapping[str, Mapping[str, Any]], family: str
) -> None:
    """Raises a UserError unless a file of these tensors, read again, has these configurations.

    Args:
        tensors: of the original layout.
        configs: of the parts and, where it is known, of the `scheduler`.
    """
    try:
        read = configs_of(tensors, header, family)
    except (KeyError, IndexError, StopIteration, ValueError) as error:
        what = f"it {str(error).partition('; ')[0]}" if type(error) is ValueError else "its blocks are of no known kind"
        raise UserError(f"export: a single file cannot hold this model, for {what}; {_REMEDY}") from error
    for part, config in configs.items():
        for key in sorted(read[part].keys() & (_OF_SCHEDULE if part == "scheduler" else config.keys() - _UNSAID)):
            if key == "projection_dim" and part == "text_encoder":  # nothing is projected
                continue
            given, again = (_settled(each.get(key), key, read[part]) for each in (config, read[part]))
            if given != again:
                raise UserError(
                    f"export: a single file cannot say that {part} has {key} = {given!r}: it would be read as one with "
                    f"{again!r}; {_REMEDY}"
                )


def _settled(value: Any, key: str, read: Config) -> Any:
    """A value as it is compared: of those of each block, the ones that a network reads."""
    if key in ("attention_head_dim", "transformer_layers_per_block"):
        blocks = read["down_block_types"]
        values = [value] * len(blocks) if isinstance(value, int) else list(value)
        is_read = ["CrossAttn" in kind for kind in blocks[:-1]] + [True]  # the last also says what the middle has
        return [each for each, counts in zip(values, is_read, strict=False) if counts]
    return list(value) if isinstance(value, tuple) else value


def unet_config(tensors: Mapping[str, Tensor], family: str) -> Config:
    """The denoiser's, but for `sample_size`."""
    shape = _Shapes(tensors, UNET)
    widths, layers, depths = _down_blocks(shape)
    with_attention = [depth > 0 for depth in depths]
    # A block without transformers says nothing of their depth; the last says that of the middle's.
    depths = [max(depth, 1) for depth in depths]
    depths[-1] = _count(shape, r"middle_block\.1\.transformer_blocks\.(\d+)\.")
    key = next(name for name in shape if name.endswith("attn2.to_k.weight"))
    # Called attention_head_dim, this is the number of heads.
    heads = 8 if family == "sd1" else [max(width // 64, 1) for width in widths]
    is_xl = family == "sdxl"
    added = shape["label_emb.0.0.weight"][1] if is_xl else None
    projection = tensors.get(f"{TEXT_PREFIXES['sdxl']['text_encoder_2']}text_projection")
    pooled = projection.shape[1] if projection else 1280
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "addition_embed_type": "text_time" if is_xl else None,
        "addition_time_embed_dim": (added - pooled) // 6 if added else None,
        "attention_head_dim": heads,
        "block_out_channels": widths,
        "cross_attention_dim": shape[key][1],
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in with_attention],
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": shape["input_blocks.0.0.weight"][1],
        "layers_per_block": layers,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "out_channels": shape["out.2.weight"][0],
        "projection_class_embeddings_input_dim": added,
        "transformer_layers_per_block": depths,
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in with_attention[::-1]],
        "use_linear_projection": len(shape["middle_block.1.proj_in.weight"]) == 2,
    }


def _down_blocks(shape: Mapping[str, tuple[int, ...]]) -> tuple[list[int], int, list[int]]:
    """The width of each block on the way down, the number of layers of the first, the depth of each's transformers."""
    widths, depths, layers, number = [0], [0], [0], 1
    while any(name.startswith(f"input_blocks.{number}.") for name in shape):
        if f"input_blocks.{number}.0.op.weight" in shape:  # the next block begins
            widths, depths, layers = [*widths, 0], [*depths, 0], [*layers, 0]
        else:
            widths[-1] = shape[f"input_blocks.{number}.0.out_layers.3.weight"][0]
            depths[-1] = _count(shape, rf"input_blocks\.{number}\.1\.transformer_blocks\.(\d+)\.")
            layers[-1] += 1
        number += 1
    return widths, layers[0], depths


def _count(names: Mapping[str, Any], pattern: str) -> int:
    """How many numbers the pattern finds at the beginnings of names."""
    return len({match[1] for match in map(re.compile(pattern).match, names) if match})


def vae_config(tensors: Mapping[str, Tensor], family: str) -> Config:
    """The autoencoder's, but for `sample_size`."""
    shape = _Shapes(tensors, VAE)
    blocks = _count(shape, r"encoder\.down\.(\d+)\.")
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [shape[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(blocks)],
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "in_channels": shape["encoder.conv_in.weight"][1],
        "latent_channels": shape["post_quant_conv.weight"][0],
        "layers_per_block": _count(shape, r"encoder\.down\.0\.block\.(\d+)\."),
        "norm_num_groups": 32,
        "out_channels": shape["decoder.conv_out.weight"][0],
        "scaling_factor": 0.13025 if family == "sdxl" else 0.18215,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
    }


def text_config(tensors: Mapping[str, Tensor], part: str, family: str) -> Config:
    """A text encoder's."""
    prefix, is_open = TEXT_PREFIXES[family][part], is_open_clip(part, family)
    shape = _Shapes(tensors, prefix)
    if is_open:
        embedding, positions = shape["token_embedding.weight"], shape["positional_embedding"]
        hidden = shape["transformer.resblocks.0.mlp.c_fc.weight"][0]
        layers = _count(shape, r"transformer\.resblocks\.(\d+)\.")
        if part == "text_encoder":
            layers = _used_layers(layers)
    else:
        embedding = shape["text_model.embeddings.token_embedding.weight"]
        positions = shape["text_model.embeddings.position_embedding.weight"]
        hidden = shape["text_model.encoder.layers.0.mlp.fc1.weight"][0]
        layers = _count(shape, r"text_model\.encoder\.layers\.(\d+)\.")
    has_projection = part == "text_encoder_2"
    return {
        "architectures": ["CLIPTextModelWithProjection" if has_projection else "CLIPTextModel"],
        "bos_token_id": 0,
        "eos_token_id": 2,  # transformers' sign that the end of a text is its highest token
        "hidden_act": "gelu" if is_open else "quick_gelu",
        "hidden_size": embedding[1],
        "intermediate_size": hidden,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": positions[0],
        "model_type": "clip_text_model",
        "num_attention_heads": max(embedding[1] // 64, 1),
        "num_hidden_layers": layers,
        "pad_token_id": 1,
        "projection_dim": shape["text_projection"][1] if has_projection else embedding[1],
        "vocab_size": embedding[0],
    }


def _used_layers(layers: int) -> int:
    """How many of the layers of Stable Diffusion 2's text encoder, OpenCLIP's ViT-H, it puts to use.

    That is all but the last, which some files leave out and diffusers' model does not have.

    Raises:
        ValueError: the file has another number.
    """
    if layers not in (SD2_TEXT_LAYERS, SD2_TEXT_LAYERS + 1):
        raise ValueError(
            f"has a text encoder of {layers} layers, where Stable Diffusion 2's has {SD2_TEXT_LAYERS + 1}, or "
            f"{SD2_TEXT_LAYERS} without the last, which it does not use; give a diffusers directory, which says which "
            "are used"
        )
    return SD2_TEXT_LAYERS


def scheduler_config(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], family: str) -> Config:
    """The schedule; what the model predicts is in the header, or a marker says so, or (2.x) its weights do."""
    if flow := stored_scheduler(metadata):
        return flow
    return {
        "_class_name": "EulerDiscreteScheduler" if family == "sdxl" else "DDIMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction" if _predicts_velocity(tensors, metadata, family) else "epsilon",
        "rescale_betas_zero_snr": "ztsnr" in tensors or metadata.get("ss_zero_terminal_snr") == "True",
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": None,
    }


def _predicts_velocity(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], family: str) -> bool:
    said = metadata.get("modelspec.prediction_type", "")
    if said in ("epsilon", "v"):
        return said == "v"
    said = metadata.get("ss_v_parameterization", "")
    if said in ("True", "False"):
        return said == "True"
    if "v_pred" in tensors:
        return True
    if family == "sd2" and _VELOCITY_BIAS in tensors:
        return float(np.std(tensors[_VELOCITY_BIAS]().astype(np.float64), ddof=1)) > _VELOCITY_DEVIATION
    return False


def latent_size(metadata: Mapping[str, str], prediction_type: str, family: str) -> int:
    """The latents' side in training, of the header's resolution, or as the family's first models had it."""
    if match := re.fullmatch(r"(\d{2,5})x\d+", metadata.get("modelspec.resolution", "")):
        return int(match[1]) // 8
    if family == "sd2":
        return latent_side(prediction_type)
    return {"sd1": 64, "sdxl": 128}[family]
