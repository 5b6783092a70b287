"""Stable Diffusion 1.x and 2.x: a UNet that is told of captions by the hidden states of one CLIP text encoder.

R. Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv 2112.10752.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree
from ml_collections import ConfigDict

from offsetjax.models.autoencoder import Autoencoder
from offsetjax.models.family import Captions, Conditions, Family
from offsetjax.models.text import TextEncoder
from offsetjax.models.unet import UNet


def _build(model: ConfigDict, dtype: Any) -> dict[str, Any]:
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


def _is_second(model: ConfigDict) -> bool:
    return bool(model.unet.use_linear_projection)


def _is_xl(model: ConfigDict) -> bool:
    return model.unet.addition_embed_type == "text_time"


SD1 = Family(
    name="sd1",
    title="Stable Diffusion 1.x",
    denoiser="unet",
    autoencoder="vae",
    encoders=("text_encoder",),
    build=_build,
    condition=_condition,
    is_like=lambda model: not _is_xl(model) and not _is_second(model),
    tokenizer_folders={"text_encoder": "tokenizer"},
    encodes_in_half=True,
)

SD2 = Family(
    name="sd2",
    title="Stable Diffusion 2.x",
    denoiser="unet",
    autoencoder="vae",
    encoders=("text_encoder",),
    build=_build,
    condition=_condition,
    is_like=lambda model: not _is_xl(model) and _is_second(model),
    tokenizer_folders={"text_encoder": "tokenizer"},
    encodes_in_half=True,
)
