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

from offsetjax.models.autoencoder import Autoencoder
from offsetjax.models.family import Captions, Conditions, Family
from offsetjax.models.stable_diffusion import zeroed
from offsetjax.models.text import TextEncoder
from offsetjax.models.unet import UNet


def _build(model: ConfigDict, dtype: Any) -> dict[str, Any]:
    return {
        "unet": UNet(model.unet.to_dict(), dtype),
        "vae": Autoencoder(model.vae.to_dict()),
        "text_encoder": TextEncoder(model.text_encoder.to_dict(), dtype, is_penultimate=True),
        "text_encoder_2": TextEncoder(model.text_encoder_2.to_dict(), dtype, is_penultimate=True, has_projection=True),
    }


def _condition(
    parts: Mapping[str, Any], params: Mapping[str, PyTree], captions: Captions, model: Mapping[str, Any]
) -> Conditions:
    encoded = [parts[part].apply(params[part], captions.input_ids[part]) for part in ("text_encoder", "text_encoder_2")]
    hidden, pooled = jnp.concatenate([each for each, _ in encoded], axis=-1), encoded[-1][1]
    return {
        "encoder_hidden_states": zeroed(hidden, captions, model),
        "added_conditions": {"text_embeds": zeroed(pooled, captions, model), "time_ids": captions.time_ids},
    }


SDXL = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    denoiser="unet",
    autoencoder="vae",
    encoders=("text_encoder", "text_encoder_2"),
    build=_build,
    condition=_condition,
    is_like=lambda model: model.unet.addition_embed_type == "text_time",
    tokenizer_folders={"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"},
)
