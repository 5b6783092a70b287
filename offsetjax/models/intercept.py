"""Corrections to the Flax modules of other libraries, through Flax's public `intercept_methods`.

`unet.py` and `autoencoder.py` say what is corrected of theirs; here is what they share. No parameter changes its name.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from offsetjax.models import norms


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
    channels = x.shape[-1]
    scale = module.param("scale", module.scale_init, (channels,), module.param_dtype)
    bias = module.param("bias", module.bias_init, (channels,), module.param_dtype)
    return norms.group_norm(x, scale, bias, groups, module.epsilon if epsilon is None else epsilon)
