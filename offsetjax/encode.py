"""The frozen parts: pixels and token ids to latents and embeddings."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, UInt8

from offsetjax.models.autoencoder import Autoencoder


def to_unit_range(pixels: UInt8[Array, "b h w 3"]) -> Float[Array, "b 3 h w"]:
    """Bytes to [-1, 1], channels first."""
    return jnp.transpose(pixels.astype(jnp.float32) / 127.5 - 1.0, (0, 3, 1, 2))


def sample_latent(
    key: Key[Array, ""], mean: Float[Array, "c h w"], log_variance: Float[Array, "c h w"]
) -> Float[Array, "c h w"]:
    """One draw from the autoencoder's posterior, for one example."""
    return mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)


def encode_pixels(
    vae: Autoencoder, params: PyTree, pixels: UInt8[Array, "b h w 3"], keys: Key[Array, " b"]
) -> Float[Array, "b c h w"]:
    """Scaled latents, drawn from the posterior with one key an example."""
    moments = vae.encode(params, to_unit_range(pixels))
    return jax.vmap(sample_latent)(keys, *moments) * vae.config["scaling_factor"]


def drop_captions(
    keys: Key[Array, " b"], input_ids: Int[Array, "b n"], empty_ids: Int[Array, " n"], probability: float
) -> Int[Array, "b n"]:
    """Replaces a share of the captions by the empty one, for classifier-free guidance (arXiv 2207.12598)."""
    dropped: Bool[Array, " b"] = jax.vmap(lambda key: jax.random.bernoulli(key, probability))(keys)
    return jnp.where(dropped[:, None], empty_ids, input_ids)
