"""Stable Diffusion 1.x and 2.x: a UNet conditioned on captions by the hidden states of one CLIP text encoder.

R. Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv 2112.10752. What XL shares is
here too. The networks are imported where they are built: a config is checked without them.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Int, PyTree
from ml_collections import ConfigDict

from offsetjax.config import presets
from offsetjax.errors import UserError
from offsetjax.formats.lora_names import Kohya, original_names
from offsetjax.models.family import Captions, Conditions, Family, Files, Tokenizing, Values

CLIP_VOCABULARY = 49408  # tokens of CLIP's own vocabulary, which the text encoders of every version know

_ACTIVATIONS = ("quick_gelu", "gelu")
# diffusers' samplers of the schedules that a Stable Diffusion is trained with; of others, such as EDM's and flow
# matching's, the same fields mean something else, or are not there.
_SCHEDULERS = (
    *("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "DEISMultistepScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler", "EulerDiscreteScheduler"),
    *("EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler"),
    *("KDPM2AncestralDiscreteScheduler", "LCMScheduler", "PNDMScheduler", "SASolverScheduler", "TCDScheduler"),
    "UniPCMultistepScheduler",
)

REQUIRED: dict[str, dict[str, tuple[Any, ...]]] = {
    "unet": {
        "act_fn": ("silu", "swish"),
        "addition_embed_type": (None, "text_time"),
        "attention_type": ("default",),
        "center_input_sample": (False,),
        "class_embed_type": (None,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "cross_attention_norm": (None,),
        "downsample_padding": (1,),
        "dual_cross_attention": (False,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "in_channels": (4,),
        "mid_block_scale_factor": (1,),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "norm_eps": (1e-5,),
        "num_attention_heads": (None,),  # the number of heads goes by the name of attention_head_dim
        "only_cross_attention": (False,),
        "resnet_out_scale_factor": (1.0,),
        "resnet_skip_time_act": (False,),
        "resnet_time_scale_shift": ("default",),
        "reverse_transformer_layers_per_block": (None,),
        "time_cond_proj_dim": (None,),
        "time_embedding_dim": (None,),
        "time_embedding_type": ("positional",),
        "timestep_post_act": (None,),
    },
    "vae": {
        "act_fn": ("silu", "swish"),
        "use_quant_conv": (True,),
        "use_post_quant_conv": (True,),
        "shift_factor": (None,),
        "latents_mean": (None,),
        "latents_std": (None,),
    },
    "text_encoder": {"hidden_act": _ACTIVATIONS},
    "text_encoder_2": {"hidden_act": _ACTIVATIONS},
    "scheduler": {
        "_class_name": _SCHEDULERS,
        "beta_schedule": ("scaled_linear",),
        "prediction_type": ("epsilon", "v_prediction"),
        "trained_betas": (None,),
        **dict.fromkeys(("use_flow_sigmas", "use_beta_sigmas", "use_exponential_sigmas"), (False, None)),
    },
}
# What diffusers takes where a config.json does not say it.
BY_DEFAULT: dict[str, dict[str, Any]] = {"scheduler": {"beta_schedule": "linear"}}
# Files differ in these, and a single file of Stable Diffusion 2 does not say the second.
WITHOUT_EFFECT = ("model.vae.sample_size", "model.text_encoder.projection_dim")

SAID_BY_INDEX = {"force_zeros_for_empty_prompt": False}

INDEX = {
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
}


def _build(model: ConfigDict, dtype: Any) -> dict[str, Any]:
    from offsetjax.models.autoencoder import Autoencoder
    from offsetjax.models.text import TextEncoder
    from offsetjax.models.unet import UNet

    return {
        "unet": UNet(model.unet.to_dict(), dtype),
        "vae": Autoencoder(model.vae.to_dict()),
        "text_encoder": TextEncoder(model.text_encoder.to_dict(), dtype),
    }


def _condition(
    parts: Mapping[str, Any], params: Mapping[str, PyTree], captions: Captions, model: Mapping[str, Any]
) -> Conditions:
    """The hidden states of the text encoder's last layer."""
    hidden, _ = parts["text_encoder"].apply(params["text_encoder"], captions.input_ids["text_encoder"])
    return {"encoder_hidden_states": zeroed(hidden, captions, model)}


def zeroed(states: Float[Array, "b *n"], captions: Captions, model: Mapping[str, Any]) -> Float[Array, "b *n"]:
    """The states, of an empty caption zeros where the model was trained so (`model.force_zeros_for_empty_prompt`)."""
    if not model["force_zeros_for_empty_prompt"]:
        return states
    return jnp.where(captions.is_empty.reshape(-1, *(1 for _ in states.shape[1:])), 0.0, states)


def latents(values: Values) -> tuple[int, int]:
    """The channels of the latents, and how many pixels a latent pixel is on a side."""
    return values["model.vae.latent_channels"], 2 ** (len(values["model.vae.block_out_channels"]) - 1)


def resolution_unit(model: ConfigDict, parts: Sequence[str]) -> int:
    """What the blocks of the networks halve pictures by."""
    return 2 ** sum(len(model[part].block_out_channels) - 1 for part in parts)


def _tokenize(tokenizer: Any, caption: str) -> tuple[Int[np.ndarray, " n"], int]:
    from offsetjax.models.tokenizer import tokenize

    tokens = tokenize((tokenizer,), caption)
    return tokens.input_ids[0], tokens.num_tokens


def _load(folder: epath.Path) -> Any:
    from offsetjax.models.tokenizer import load_tokenizer

    return load_tokenizer(folder)


def _save(tokenizer: Any, folder: epath.Path) -> None:
    from offsetjax.models.tokenizer import save_tokenizer

    save_tokenizer(tokenizer, folder)


def _fit(tokenizer: Any, encoder: ConfigDict) -> Any:
    if len(tokenizer) > encoder.vocab_size:
        raise ValueError(f"a tokenizer of {len(tokenizer)} tokens, of which its encoder knows {encoder.vocab_size}")
    return tokenizer.shortened(encoder.max_position_embeddings)  # some files do not say how long a caption may be


def _new(model: ConfigDict, captions: Sequence[str], parts: Sequence[str]) -> dict[str, Any]:
    """One tokenizer for all text encoders, which has learnt its words from captions."""
    from offsetjax.models.tokenizer import train_tokenizer

    texts = [model[part] for part in parts]
    words, length = min(text.vocab_size for text in texts), texts[0].max_position_embeddings
    return dict.fromkeys(parts, train_tokenizer(captions, words, length))


def _published(model: ConfigDict, pads: Mapping[str, str]) -> dict[str, Any] | None:
    """CLIP's own, where the encoders know as many tokens as it has."""
    from offsetjax.models.tokenizer import clip_tokenizer

    if any(model[part].vocab_size != CLIP_VOCABULARY for part in pads):
        return None
    return {part: clip_tokenizer(pad) for part, pad in pads.items()}


def tokenizing(pads: Mapping[str, str]) -> Tokenizing:
    """CLIP's tokenizers, each in its own folder.

    Args:
        pads: what a caption is filled up with, by text encoder: the end mark by OpenAI's, "!" by OpenCLIP's.
    """
    parts = tuple(pads)
    return Tokenizing(
        folders={part: part.replace("text_encoder", "tokenizer") for part in parts},
        load=_load,
        save=_save,
        tokenize=_tokenize,
        new=partial(_new, parts=parts),
        published=partial(_published, pads=pads),
        fit=_fit,
    )


def check_networks(model: ConfigDict, encoders: Sequence[str]) -> None:
    """Raises a UserError unless the denoiser takes the latents and what the text encoders give."""
    channels = model.vae.latent_channels
    if (model.unet.in_channels, model.unet.out_channels) != (channels, channels):
        raise UserError(
            f"config: model.unet.in_channels = {model.unet.in_channels} and model.unet.out_channels = "
            f"{model.unet.out_channels} must be {channels}, the model.vae.latent_channels"
        )
    hidden = sum(model[part].hidden_size for part in encoders)
    if model.unet.cross_attention_dim != hidden:
        raise UserError(
            f"config: model.unet.cross_attention_dim = {model.unet.cross_attention_dim} must be {hidden}, the hidden "
            f"size of {' and '.join(encoders)}"
        )


def check_embedding(model: ConfigDict, expected: str) -> None:
    """Raises a UserError unless the denoiser takes the conditions that the family gives it beside the captions."""
    if model.unet.addition_embed_type != expected:
        raise UserError(
            f"config: model.unet.addition_embed_type = {model.unet.addition_embed_type!r} does not go with "
            f"model.family = {model.family!r}; it is 'text_time' in SDXL alone"
        )


def _check(model: ConfigDict) -> None:
    check_networks(model, ("text_encoder",))
    check_embedding(model, "")


def is_xl(values: Values) -> bool:
    return values["model.unet.addition_embed_type"] == "text_time"


def _is_second(values: Values) -> bool:
    return bool(values["model.unet.use_linear_projection"])


_LORA_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_"}


def _family(
    name: str,
    title: str,
    is_like: Callable[[Values], bool],
    preset: Callable[[ConfigDict], None],
    pad: str,
    files: Files,
) -> Family:
    return Family(
        name=name,
        title=title,
        denoiser="unet",
        autoencoder="vae",
        encoders=("text_encoder",),
        build=_build,
        condition=_condition,
        latents=latents,
        resolution_unit=resolution_unit,
        tokenizing=tokenizing({"text_encoder": pad}),
        files=files,
        is_like=is_like,
        check=_check,
        preset=preset,
        encodes_in_half=True,
    )


def _files(architecture: Callable[[str], str], kohya: Kohya, original: str) -> Files:
    return Files(
        pipeline="StableDiffusionPipeline",
        architecture=architecture,
        required=REQUIRED,
        by_default=BY_DEFAULT,
        unread=WITHOUT_EFFECT,
        index=lambda settings: {**INDEX, "requires_safety_checker": False, "safety_checker": [None, None]},
        said_by_index=SAID_BY_INDEX,
        kohya=kohya,
        original=original,
    )


SD1 = _family(
    "sd1",
    "Stable Diffusion 1.x",
    lambda values: not is_xl(values) and not _is_second(values),
    presets.stable_diffusion_1,
    "<|endoftext|>",
    _files(
        lambda predicts: "stable-diffusion-v1",
        Kohya(_LORA_PREFIXES, {"unet": original_names}, base_version="sd_v1"),
        "https://github.com/CompVis/stable-diffusion",
    ),
)

SD2 = _family(
    "sd2",
    "Stable Diffusion 2.x",
    lambda values: not is_xl(values) and _is_second(values),
    presets.stable_diffusion_2,
    "!",
    _files(
        lambda predicts: "stable-diffusion-v2-768-v" if predicts == "v" else "stable-diffusion-v2-512",
        Kohya(_LORA_PREFIXES, {"unet": original_names}, base_version="sd_v2", is_v2=True),
        "https://github.com/Stability-AI/stablediffusion",
    ),
)
