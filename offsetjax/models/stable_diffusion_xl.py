"""Stable Diffusion XL's base model: two text encoders, the caption as a whole, and the sizes of the picture.

The UNet reads the hidden states of both encoders before their last layer, side by side along the channels; the second
encoder's projection of the end of the text; and the picture's original size, crop and target size. D. Podell et al.,
"SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis", arXiv 2307.01952.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree
from ml_collections import ConfigDict

from offsetjax.config import presets
from offsetjax.errors import UserError
from offsetjax.formats.lora_names import Kohya, original_names
from offsetjax.models.family import Captions, Conditions, Family, Files
from offsetjax.models.stable_diffusion import (
    BY_DEFAULT,
    INDEX,
    REQUIRED,
    SAID_BY_INDEX,
    WITHOUT_EFFECT,
    check_embedding,
    check_networks,
    is_xl,
    latents,
    resolution_unit,
    tokenizing,
    zeroed,
)

_ENCODERS = ("text_encoder", "text_encoder_2")


def _build(model: ConfigDict, dtype: Any) -> dict[str, Any]:
    from offsetjax.models.autoencoder import Autoencoder
    from offsetjax.models.text import TextEncoder
    from offsetjax.models.unet import UNet

    return {
        "unet": UNet(model.unet.to_dict(), dtype),
        "vae": Autoencoder(model.vae.to_dict()),
        "text_encoder": TextEncoder(model.text_encoder.to_dict(), dtype, is_penultimate=True),
        "text_encoder_2": TextEncoder(model.text_encoder_2.to_dict(), dtype, is_penultimate=True, has_projection=True),
    }


def _condition(
    parts: Mapping[str, Any], params: Mapping[str, PyTree], captions: Captions, model: Mapping[str, Any]
) -> Conditions:
    encoded = [parts[part].apply(params[part], captions.input_ids[part]) for part in _ENCODERS]
    hidden, pooled = jnp.concatenate([each for each, _ in encoded], axis=-1), encoded[-1][1]
    return {
        "encoder_hidden_states": zeroed(hidden, captions, model),
        "added_conditions": {"text_embeds": zeroed(pooled, captions, model), "time_ids": captions.time_ids},
    }


def _check(model: ConfigDict) -> None:
    check_networks(model, _ENCODERS)
    check_embedding(model, "text_time")
    pooled = model.text_encoder_2.projection_dim + 6 * model.unet.addition_time_embed_dim
    if model.unet.projection_class_embeddings_input_dim != pooled:
        raise UserError(
            f"config: model.unet.projection_class_embeddings_input_dim must be {pooled}: the projection of "
            "text_encoder_2 and six embeddings of addition_time_embed_dim"
        )


def _unread(model: ConfigDict) -> tuple[str, ...]:
    """The first text encoder is read before its last layer."""
    last = model.text_encoder.num_hidden_layers - 1
    return (f"text_encoder/text_model/encoder/layers/{last}/", "text_encoder/text_model/final_layer_norm/")


def _index(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **INDEX,
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "force_zeros_for_empty_prompt": settings["force_zeros_for_empty_prompt"],
    }


SDXL = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    denoiser="unet",
    autoencoder="vae",
    encoders=_ENCODERS,
    build=_build,
    condition=_condition,
    latents=latents,
    resolution_unit=resolution_unit,
    tokenizing=tokenizing({"text_encoder": "<|endoftext|>", "text_encoder_2": "!"}),
    files=Files(
        pipeline="StableDiffusionXLPipeline",
        architecture=lambda predicts: "stable-diffusion-xl-v1-base",
        required=REQUIRED,
        by_default=BY_DEFAULT,
        unread=WITHOUT_EFFECT,
        index=_index,
        said_by_index=SAID_BY_INDEX,
        kohya=Kohya(
            {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
            {"unet": original_names},
            writes_original=True,
            base_version="sdxl_base_v1-0",
        ),
        original="https://github.com/Stability-AI/generative-models",
    ),
    is_like=is_xl,
    check=_check,
    preset=presets.stable_diffusion_xl,
    unread=_unread,
)
