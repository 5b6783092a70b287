"""Attention by the kernel that suits the device; every kernel gives the same numbers to rounding.

    softmax(q kᵀ / √e) v,  for each head of e channels; scores and softmax in float32

- `xla`: plain einsums, which write the scores [b, heads, n, m] to memory;
- `splash`: jax's Pallas kernel for TPUs, which keeps them in the chip (FlashAttention, arXiv 2205.14135), forward and
  backward; for attention of an image to itself, long enough that the scores are what fills the memory;
- `cudnn`: the same on NVIDIA GPUs, in half precision.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

KERNELS = ("auto", "xla", "splash", "cudnn")
_OF_PLATFORM = {"tpu": "splash", "gpu": "cudnn"}
SHORTEST = 1024  # positions; the scores of fewer are small beside the rest
_BLOCKS = (512, 256, 128)  # queries and keys that the Pallas kernel holds at a time: the first that divides
_MOST_CHANNELS = {"splash": 256, "cudnn": 128}  # of a head; cuDNN takes 256 on its newest devices alone


def kernel_of(setting: str, platform: str, dtype: jnp.dtype) -> str:
    """The kernel that `model.attention` names, on this platform: "tpu", "gpu" or "cpu".

    Raises:
        ValueError: the platform, or the type, does not have it.
    """
    kernel = _OF_PLATFORM.get(platform, "xla") if setting == "auto" else setting
    is_half = jnp.dtype(dtype).itemsize == 2
    if kernel == "cudnn" and not is_half and setting == "auto":
        kernel = "xla"
    if kernel == "splash" and platform != "tpu":
        raise ValueError(f"splash is a kernel for TPUs, and this is a {platform}")
    if kernel == "cudnn" and (platform != "gpu" or not is_half):
        raise ValueError(f"cudnn has kernels for GPUs in bfloat16 and float16, and this is a {platform} in {dtype}")
    return kernel


def takes_kernel(kernel: str, length: int, context_length: int, channels: int) -> bool:
    """Whether attention from `length` to `context_length` positions goes through a kernel other than `xla`."""
    is_divided = kernel != "splash" or length % _BLOCKS[-1] == 0
    return (
        kernel != "xla"
        and length == context_length
        and length >= SHORTEST
        and is_divided
        and channels <= _MOST_CHANNELS[kernel]
    )


def attend(
    query: Float[Array, "b n d"],
    key: Float[Array, "b m d"],
    value: Float[Array, "b m d"],
    heads: int,
    *,
    kernel: str = "xla",
    mask: Bool[Array, "n m"] | None = None,
    interpret: bool = False,
) -> Float[Array, "b n d"]:
    """Attention of each of the `heads`, whose channels stand side by side.

    Args:
        mask: where it is False a query does not see a key; only `xla` takes one.
        interpret: run a Pallas kernel on a device that it is not for, slowly, as tests do.
    """
    query, key, value = (x.reshape(*x.shape[:2], heads, -1) for x in (query, key, value))
    if mask is not None or not takes_kernel(kernel, query.shape[1], key.shape[1], query.shape[-1]):
        kernel = "xla"
    attended = {
        "xla": functools.partial(_xla, mask=mask),
        "splash": functools.partial(_splash, interpret=interpret),
        "cudnn": functools.partial(jax.nn.dot_product_attention, implementation="cudnn"),
    }[kernel](query, key, value)
    return attended.reshape(*attended.shape[:2], -1)


Heads = Float[Array, "b n k e"]


def _xla(query: Heads, key: Heads, value: Heads, mask: Bool[Array, "n m"] | None) -> Heads:
    scores = jnp.einsum("bnke,bmke->bknm", query, key, preferred_element_type=jnp.float32)
    weights = nn.softmax(scores * query.shape[-1] ** -0.5, axis=-1, where=mask).astype(value.dtype)
    return jnp.einsum("bknm,bmke->bnke", weights, value)


def _splash(query: Heads, key: Heads, value: Heads, interpret: bool) -> Heads:
    length, channels = query.shape[1], query.shape[-1]

    def local(query: Heads, key: Heads, value: Heads) -> Heads:
        kernel = _splash_kernel(query.shape[2], length, interpret)
        # The kernel does not scale the scores. The scale of 64 channels, 1/8, is exact in any type.
        query, key, value = (x.swapaxes(1, 2) for x in (query * channels**-0.5, key, value))
        return jax.vmap(kernel)(query, key, value).swapaxes(1, 2)

    return _on_each_device(local)(query, key, value)


def _splash_kernel(heads: int, length: int, interpret: bool) -> Callable:
    mask = masks.MultiHeadMask([masks.FullMask((length, length))] * heads)
    block = next(size for size in _BLOCKS if length % size == 0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    return splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)


def _on_each_device(function: Callable[[Heads, Heads, Heads], Heads]) -> Callable[[Heads, Heads, Heads], Heads]:
    """The function of a device's heads: the compiler splits a batch and heads by itself, but never a Pallas kernel.

    Where a mesh splits heads over `tensor`, each device takes its own; a number of heads that does not divide is
    attended to by all of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    left = {axis for axis in mesh.axis_names if axis not in mesh.manual_axes and mesh.shape[axis] > 1}
    if not left:
        return function

    def divided(query: Heads, key: Heads, value: Heads) -> Heads:
        split = P(None, None, "tensor") if query.shape[2] % mesh.shape["tensor"] == 0 else P()
        return jax.shard_map(function, in_specs=split, out_specs=split, axis_names=left, check_vma=False)(
            query, key, value
        )

    return divided
