r"""Offset noise: training noise that also shifts the mean of each channel.

For one latent `x0` of shape `[c, h, w]`, with `N = h w`:

    n = ε + c ξ,    ε ~ N(0, I) for each pixel,    ξ ~ N(0, 1) for each channel, the same for all its pixels

so the covariance of a channel is `I + c² 11ᵀ`: the zero-frequency mode has variance `1 + c² N`, all others 1. `c` is
`offset_strength`, called `noise_offset` by kohya's scripts and diffusers. `n` is also the target of the loss, and the
sampler must start from the same distribution.

Source: N. Guttenberg, "Diffusion with Offset Noise", CrossLabs, 2023.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


@jax.jit
def offset_noise(
    key: Key[Array, ""], latent: Float[Array, "c h w"], strength: float | Float[Array, ""]
) -> Float[Array, "c h w"]:
    """Noise for ONE latent; use `jax.vmap` with one key an example for a batch.

    Args:
        key: the example's own key.
        latent: gives the shape and the floating type; its values are not used.
        strength: standard deviation `c` of the shift of each channel's mean; 0 is plain noise, bit for bit.

    Returns:
        `ε + strength ξ`, of the latent's shape and type.

    Example:
        >>> keys = jax.random.split(jax.random.key(0), 2)
        >>> jax.vmap(offset_noise, in_axes=(0, 0, None))(keys, jnp.zeros((2, 4, 64, 64)), 0.1).shape
        (2, 4, 64, 64)
    """
    pixel_key, offset_key = jax.random.split(key)
    pixels = jax.random.normal(pixel_key, latent.shape, latent.dtype)
    shift = jax.random.normal(offset_key, (latent.shape[0], 1, 1), latent.dtype)
    return pixels + jnp.asarray(strength, latent.dtype) * shift


@partial(jax.jit, static_argnames="shape")
def batch_noise(
    keys: Key[Array, " b"], shape: tuple[int, int, int], strength: float | Float[Array, ""]
) -> Float[Array, "b c h w"]:
    """`offset_noise` for each key, float32: the noise of a training batch, or the start of its sampler."""
    return jax.vmap(lambda key: offset_noise(key, jnp.zeros(shape), strength))(keys)
