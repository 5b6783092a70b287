"""Corrections to the Flax modules of diffusers, through Flax's public `intercept_methods`.

Each makes a converted model give PyTorch's numbers, and no parameter changes its name:

- GEGLU takes the exact GELU (diffusers' Flax: the tanh approximation);
- the group normalisation of a transformer has ε = 1e-6 (diffusers' Flax: 1e-5);
- group normalisation has the configured number of groups (diffusers' Flax UNet: always 32), and gives the type of its
  input (Flax: float32, which would turn bfloat16 convolutions into float32 ones); its variance does not drown in the
  mean (Flax takes E x² - (E x)², which on a picture of one colour is rounding and nothing else);
- softmax is taken in float32, of scores in float32 (diffusers' Flax: in the compute type), in the
  autoencoder of some queries at a time;
- upsampling repeats pixels (diffusers' Flax gathers them and scatters their gradients: the same numbers, slowly);
- the autoencoder's attention can be left out (`mid_block_add_attention=False`, as in PyTorch).
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from diffusers.models import resnet_flax, vae_flax
from diffusers.models.attention_flax import FlaxAttention, FlaxGEGLU, FlaxTransformer2DModel
from jaxtyping import Array, Float

from offsetjax.models.attention import attend

_VAE_QUERIES = 4096


def torch_numerics(
    norm_num_groups: int = 32, vae_attention: bool = True, kernel: str = "xla"
) -> AbstractContextManager[None]:
    """A context in which the Flax modules are traced with PyTorch's numerics.

    Args:
        norm_num_groups: groups of every group normalisation.
        vae_attention: whether the autoencoder's middle block attends.
        kernel: of the UNet's attention, one of `attention.KERNELS` but `auto`.
    """
    corrections: dict[type[nn.Module], Callable[..., Any]] = {
        nn.GroupNorm: functools.partial(_group_norm, groups=norm_num_groups),
        FlaxGEGLU: _geglu,
        FlaxAttention: functools.partial(_attention, kernel=kernel),
        resnet_flax.FlaxUpsample2D: _upsample,
        vae_flax.FlaxUpsample2D: _upsample,
    }
    corrections[vae_flax.FlaxAttentionBlock] = _vae_attention if vae_attention else lambda module, x: x

    def interceptor(next_function: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        correction = corrections.get(type(context.module))
        if correction is None or context.method_name != "__call__":
            return next_function(*args, **kwargs)
        return correction(context.module, *args, **kwargs)

    return nn.intercept_methods(interceptor)


def _group_norm(module: nn.GroupNorm, x: Float[Array, "b h w c"], groups: int) -> Float[Array, "b h w c"]:
    batch, height, _, channels = x.shape
    scale = module.param("scale", module.scale_init, (channels,), module.param_dtype)
    bias = module.param("bias", module.bias_init, (channels,), module.param_dtype)
    epsilon = 1e-6 if isinstance(module.parent, FlaxTransformer2DModel) else module.epsilon

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


def _geglu(module: FlaxGEGLU, x: Float[Array, "b n d"], deterministic: bool = True) -> Float[Array, "b n e"]:
    linear, gate = jnp.split(module.proj(x), 2, axis=-1)
    return linear * nn.gelu(gate, approximate=False)


def _attention(
    module: FlaxAttention,
    x: Float[Array, "b n d"],
    context: Float[Array, "b m e"] | None = None,
    deterministic: bool = True,
    *,
    kernel: str,
) -> Float[Array, "b n d"]:
    context = x if context is None else context
    projected = module.query(x), module.key(context), module.value(context)
    return module.proj_attn(attend(*projected, module.heads, kernel=kernel))


def _vae_attention(module: vae_flax.FlaxAttentionBlock, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    positions = module.group_norm(x).reshape(len(x), -1, x.shape[-1])
    query, key, value = module.query(positions), module.key(positions), module.value(positions)
    # A part of the queries at a time: all scores of a picture of 1024 px are 1 GiB.
    parts = -(-query.shape[1] // _VAE_QUERIES) if query.shape[1] % _VAE_QUERIES == 0 else 1
    queries = query.reshape(len(x), parts, -1, query.shape[-1])
    attended = [attend(queries[:, part], key, value, module.num_heads) for part in range(parts)]
    return x + module.proj_attn(jnp.concatenate(attended, axis=1)).reshape(x.shape)


def _upsample(
    module: resnet_flax.FlaxUpsample2D | vae_flax.FlaxUpsample2D, x: Float[Array, "b h w c"]
) -> Float[Array, "b 2*h 2*w e"]:
    return module.conv(x.repeat(2, axis=1).repeat(2, axis=2))
