"""Corrections to diffusers' Flax modules, through Flax's public `intercept_methods`; no parameter changes its name.

Each makes a converted model give PyTorch's numbers:

- GEGLU takes the exact GELU (diffusers' Flax takes the tanh approximation);
- the group normalisation of a transformer has ε = 1e-6 (diffusers' Flax: 1e-5);
- group normalisation has the configured number of groups (diffusers' Flax UNet: always 32), statistics in float32,
  the result in the type of the input (Flax: float32, which would turn bfloat16 convolutions into float32 ones);
- softmax is taken in float32 (diffusers' Flax: in the compute type);
- the autoencoder's attention can be left out (`mid_block_add_attention=False`, as in PyTorch).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from diffusers.models.attention_flax import FlaxAttention, FlaxGEGLU, FlaxTransformer2DModel
from diffusers.models.vae_flax import FlaxAttentionBlock
from jaxtyping import Array, Float


def torch_numerics(norm_num_groups: int, vae_attention: bool = True) -> AbstractContextManager[None]:
    """A context in which diffusers' Flax modules are traced with PyTorch's numerics.

    Args:
        norm_num_groups: groups of every group normalisation.
        vae_attention: whether the autoencoder's middle block attends.
    """

    def interceptor(next_function: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if context.method_name == "__call__":
            if isinstance(module, nn.GroupNorm):
                return _group_norm(module, args[0], norm_num_groups)
            if isinstance(module, FlaxGEGLU):
                return _geglu(module, *args)
            if isinstance(module, FlaxAttention):
                return _attention(module, *args, **{key: kwargs[key] for key in ("context",) if key in kwargs})
            if isinstance(module, FlaxAttentionBlock) and not vae_attention:
                return args[0]
        return next_function(*args, **kwargs)

    return nn.intercept_methods(interceptor)


def _group_norm(module: nn.GroupNorm, x: Float[Array, "b h w c"], groups: int) -> Float[Array, "b h w c"]:
    channels = x.shape[-1]
    scale = module.param("scale", module.scale_init, (channels,), module.param_dtype)
    bias = module.param("bias", module.bias_init, (channels,), module.param_dtype)
    epsilon = 1e-6 if isinstance(module.parent, FlaxTransformer2DModel) else module.epsilon
    grouped = x.astype(jnp.float32).reshape(x.shape[0], -1, groups, channels // groups)
    mean = grouped.mean((1, 3), keepdims=True)
    variance = jnp.maximum(jnp.square(grouped).mean((1, 3), keepdims=True) - jnp.square(mean), 0.0)
    gain = jax.lax.rsqrt(variance + epsilon) * scale.reshape(groups, -1)
    return (grouped * gain + (bias.reshape(groups, -1) - mean * gain)).reshape(x.shape).astype(x.dtype)


def _geglu(module: FlaxGEGLU, x: Float[Array, "b n d"]) -> Float[Array, "b n e"]:
    linear, gate = jnp.split(module.proj(x), 2, axis=-1)
    return linear * nn.gelu(gate, approximate=False)


def _attention(
    module: FlaxAttention, x: Float[Array, "b n d"], context: Float[Array, "b m e"] | None = None
) -> Float[Array, "b n d"]:
    context = x if context is None else context

    def heads(projected: Float[Array, "b n d"]) -> Float[Array, "b n k e"]:
        return projected.reshape(*projected.shape[:2], module.heads, module.dim_head)

    query, key, value = heads(module.query(x)), heads(module.key(context)), heads(module.value(context))
    scores = jnp.einsum("bnke,bmke->bknm", query, key, preferred_element_type=jnp.float32) * module.scale
    weights = nn.softmax(scores, axis=-1).astype(value.dtype)
    attended = jnp.einsum("bknm,bmke->bnke", weights, value)
    return module.proj_attn(attended.reshape(*x.shape[:2], -1))
