"""Corrections to the Flax modules of other libraries, through Flax's public `intercept_methods`.

`unet.py` and `autoencoder.py` say what is corrected of theirs; here is what they share. No parameter changes its name.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def corrected(corrections: Mapping[type[nn.Module], Callable[..., Any]]) -> AbstractContextManager[None]:
    """A context in which modules are traced with another `__call__`.

    Args:
        corrections: by the module's type, (module, its inputs) → its output.
    """

    def interceptor(next_function: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        correction = corrections.get(type(context.module))
        if correction is None or context.method_name != "__call__":
            return next_function(*args, **kwargs)
        return correction(context.module, *args, **kwargs)

    return nn.intercept_methods(interceptor)


def group_norm(
    module: nn.GroupNorm, x: Float[Array, "b h w c"], groups: int, epsilon: float | None = None
) -> Float[Array, "b h w c"]:
    """Normalisation over `groups` of channels, of the type of its input.

    Flax gives float32, which would turn bfloat16 convolutions into float32 ones, and takes E x² - (E x)², which of a
    picture of one colour is rounding and nothing else.

    Args:
        epsilon: in place of the module's own.
    """
    batch, height, _, channels = x.shape
    scale = module.param("scale", module.scale_init, (channels,), module.param_dtype)
    bias = module.param("bias", module.bias_init, (channels,), module.param_dtype)
    epsilon = module.epsilon if epsilon is None else epsilon

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
