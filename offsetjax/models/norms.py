"""Normalisation over channels and over groups of them; inside in float32, and in the type of the input outside."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class RMSNorm(nn.Module):
    """x / √(mean x² + ε) · scale, over the last axis (arXiv 1910.07467)."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """The normalised x."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        full = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(full), axis=-1, keepdims=True) + self.epsilon)
        return (full * inverse * scale).astype(x.dtype)


def layer_norm(x: Float[Array, "*b d"], epsilon: float = 1e-6) -> Float[Array, "*b d"]:
    """(x - mean) / √(variance + ε) over the last axis, without gain or bias."""
    full = x.astype(jnp.float32)
    centred = full - full.mean(axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + epsilon)
    return (centred * inverse).astype(x.dtype)


class GroupNorm(nn.Module):
    """(x - mean) / √(variance + ε) · scale + bias over each group of channels and all places (arXiv 1803.08494)."""

    groups: int
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """The normalised x."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        return group_norm(x, scale, bias, self.groups, self.epsilon)


def group_norm(
    x: Float[Array, "b h w c"], scale: Any, bias: Any, groups: int, epsilon: float
) -> Float[Array, "b h w c"]:
    """`GroupNorm` of given parameters; its variance does not drown in the mean."""
    batch, height, _, channels = x.shape

    def over_groups(channel_means: Float[Array, "b c"]) -> Float[Array, "b 1 1 c"]:
        # x itself is never split into groups, which would not fit a TPU's tiles.
        means = channel_means.reshape(batch, groups, -1).mean(-1)
        return means.repeat(channels // groups, axis=1)[:, None, None]

    # Both moments in one reading of x, and exact where the mean is large: of x less the mean of its middle row. Moments
    # about any point give the same result, so the gradient need not pass through the point.
    point = jax.lax.stop_gradient(over_groups(x[:, height // 2].astype(jnp.float32).mean(1)))
    centred = x.astype(jnp.float32) - point
    mean = over_groups(centred.mean((1, 2)))
    variance = jnp.maximum(over_groups(jnp.square(centred).mean((1, 2))) - jnp.square(mean), 0.0)
    gain = jax.lax.rsqrt(variance + epsilon) * scale
    return (centred * gain + (bias - mean * gain)).astype(x.dtype)
