"""The frozen parts: pixels and token ids to latents and embeddings."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jaxtyping import Array, Bool, Float, Key, PyTree, UInt8

from offsetjax.models.family import Captions, Conditions, Ids
from offsetjax.models.pipeline import Pipeline
from offsetjax.storage import checksums

_FEW_PIXELS, _MANY_PIXELS = 2**18, 2**21  # one picture of 512 px, eight of them


def to_unit_range(pixels: UInt8[Array | np.ndarray, "b h w 3"]) -> Float[Array, "b 3 h w"]:
    """Bytes to [-1, 1], channels first."""
    return jnp.transpose(pixels.astype(jnp.float32) / 127.5 - 1.0, (0, 3, 1, 2))


def sample_latent(
    key: Key[Array, ""], mean: Float[Array, "c h w"], log_variance: Float[Array, "c h w"]
) -> Float[Array, "c h w"]:
    """One draw from the autoencoder's posterior, for one example."""
    return mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)


def encode_batch(vae: Any, params: PyTree, batch: Mapping[str, Any], keys: Key[Array, " b"]) -> Float[Array, "b c h w"]:
    """Scaled latents, drawn from the posterior with one key an example; the arguments are those of `batch_moments`."""
    return jax.vmap(sample_latent)(keys, *batch_moments(vae, params, batch)) * vae.scaling_factor


def batch_moments(
    vae: Any, params: PyTree, batch: Mapping[str, Any]
) -> tuple[Float[Array, "b c h w"], Float[Array, "b c h w"]]:
    """The posterior's mean and log-variance, not scaled: the cached ones of a batch, or of its pictures.

    Args:
        params: of the autoencoder; not read where they are cached.
        batch: `moments` float16 [b, 2, c, h, w], or `pixels` uint8 [b, H, W, 3].
    """
    if "moments" in batch:
        mean, log_variance = jnp.moveaxis(batch["moments"].astype(jnp.float32), 1, 0)
        return mean, log_variance
    return encode_moments(vae, params, batch["pixels"])


def encode_moments(
    vae: Any, params: PyTree, pixels: UInt8[Array, "b H W 3"]
) -> tuple[Float[Array, "b c h w"], Float[Array, "b c h w"]]:
    """The posterior's mean and log-variance, not scaled; a few pictures are encoded at a time."""
    params = meta.unbox(params)  # once, not for each few

    def encode(pixels: Array) -> tuple[Array, Array]:
        mean, log_variance = vae.encode(params, to_unit_range(pixels[None]))
        return mean[0], log_variance[0]

    at_once = _at_once(len(pixels), pixels.shape[1] * pixels.shape[2])
    if len(pixels) == at_once:
        return jax.vmap(encode)(pixels)
    return jax.lax.map(encode, pixels, batch_size=at_once)


def encoder_checksum(vae: Any, params: PyTree) -> str:
    """The checksum of all weights that latents depend on: of those that the autoencoder names, or of all."""
    names = getattr(vae, "encoder_params", params)
    return checksums.digest({name: params[name] for name in names if name in params})


def _at_once(count: int, pixels: int) -> int:
    """How many pictures are encoded together: the first layers hold many times what the denoiser does of a picture."""
    if count * pixels <= _FEW_PIXELS:
        return count
    # The TPU compiler cuts the pictures of any batch that is no multiple of 8, for four times the traffic of eight.
    return 8 if count % 8 == 0 and 8 * pixels <= _MANY_PIXELS else 1


def drop_captions(keys: Key[Array, " b"], input_ids: Ids, empty_ids: Ids, probability: float) -> Ids:
    """Replaces a share of the captions by the empty one, for classifier-free guidance (arXiv 2207.12598)."""
    dropped: Bool[Array, " b"] = jax.vmap(lambda key: jax.random.bernoulli(key, probability))(keys)
    return {part: jnp.where(dropped[:, None], empty_ids[part], ids) for part, ids in input_ids.items()}


def encode_captions(
    pipeline: Pipeline,
    params: Mapping[str, PyTree],
    input_ids: Ids,
    time_ids: Float[Array, "b 6"],
    empty_ids: Ids,
) -> Conditions:
    """The denoiser's conditions: of the captions and of the pictures' sizes.

    Args:
        params: of each part, as its `apply` takes them.
        input_ids: by text encoder, [b, n].
        time_ids: original height and width, crop's top and left, target height and width (arXiv 2307.01952, 2.2).
        empty_ids: of the empty caption, [n].
    """
    are_empty = [(ids == empty_ids[part]).all(1) for part, ids in input_ids.items()]
    is_empty = jnp.stack(are_empty).all(0) if are_empty else jnp.zeros(len(time_ids), bool)
    captions = Captions(input_ids, is_empty, time_ids)
    return pipeline.family.condition(pipeline.parts, params, captions, pipeline.settings)
