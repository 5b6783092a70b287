"""Attention by the kernel that suits the device; every kernel gives the same numbers to rounding.

    softmax(q kᵀ / √e + bias) v,  for each head of e channels; scores and softmax in float32

- `xla`: plain einsums, which write the scores [b, heads, n, m] to memory; takes every mask and bias;
- `splash`: jax's Pallas kernel for TPUs, which keeps them in the chip (FlashAttention, arXiv 2205.14135), forward and
  backward; for attention so long that the scores are what fills the memory;
- `cudnn`: the same on NVIDIA GPUs, in half precision.

Queries may be as many heads as keys, or several to a head of the keys (arXiv 2305.13245). All three take a causal mask
and lengths, beyond which an example has no keys; where a length does not suit its blocks, `splash` is padded.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

_OF_PLATFORM = {"tpu": "splash", "gpu": "cudnn"}
SHORTEST = 1024  # positions, both ways; the scores of fewer are small beside the rest
_BLOCKS = (512, 256, 128)  # queries and keys that the Pallas kernel holds at a time
_MOST_PADDING = 1 / 8  # of a length
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
    return (
        kernel != "xla"
        and length * context_length >= SHORTEST**2
        and min(length, context_length) >= SHORTEST // 2
        and channels <= _MOST_CHANNELS[kernel]
    )


Heads = Float[Array, "b n k e"]


def attend(
    query: Float[Array, "b n d"],
    key: Float[Array, "b m c"],
    value: Float[Array, "b m c"],
    heads: int,
    **settings: Any,
) -> Float[Array, "b n d"]:
    """`attend_by_head` of the queries' `heads`, whose channels stand side by side."""
    channels = query.shape[-1] // heads
    by_head = (x.reshape(*x.shape[:2], -1, channels) for x in (query, key, value))
    attended = attend_by_head(*by_head, **settings)
    return attended.reshape(*attended.shape[:2], -1)


def attend_by_head(
    query: Float[Array, "b n k e"],
    key: Float[Array, "b m g e"],
    value: Float[Array, "b m g e"],
    *,
    kernel: str = "xla",
    is_causal: bool = False,
    lengths: Int[Array, " b"] | None = None,
    mask: Bool[Array, "#b n m"] | Bool[Array, "n m"] | None = None,
    bias: Float[Array, "k n m"] | None = None,
    scale: float | None = None,
    interpret: bool = False,
) -> Float[Array, "b n k e"]:
    """Attention of k heads of queries to g heads of keys and values, k / g to each.

    Every query must see a key.

    Args:
        is_causal: whether a query sees no key that comes after it.
        lengths: of each example; a key at or beyond it is seen by none.
        mask: where it is False a query does not see a key; only `xla` takes one.
        bias: added to the scores; only `xla` takes one.
        scale: of the scores, in place of 1 / √e.
        interpret: run a Pallas kernel on a device that it is not for, slowly, as tests do.

    Raises:
        ValueError: the heads of the queries are no multiple of those of the keys.
    """
    if query.shape[2] % key.shape[2]:
        raise ValueError(f"{query.shape[2]} heads of queries are no multiple of {key.shape[2]} of keys")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    is_plain = mask is None and bias is None
    if not is_plain or not takes_kernel(kernel, query.shape[1], key.shape[1], query.shape[-1]):
        seen = _seen(query.shape[1], key.shape[1], is_causal, lengths, mask)
        return _xla(query, key, value, seen, bias, scale)
    if kernel == "splash":
        return _splash(query, key, value, is_causal, lengths, scale, interpret)
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        scale=scale,
        is_causal=is_causal,
        key_value_seq_lengths=None if lengths is None else lengths.astype(jnp.int32),
        implementation="cudnn",
    )


def _seen(
    length: int,
    context_length: int,
    is_causal: bool,
    lengths: Int[Array, " b"] | None,
    mask: Bool[Array, "#b n m"] | Bool[Array, "n m"] | None,
) -> Bool[Array, "#b #n m"] | Bool[Array, "n m"] | None:
    """Which keys a query sees, of all that says so."""
    every = [] if mask is None else [mask]
    if is_causal:
        every.append(jnp.tril(jnp.ones((1, length, context_length), bool)))
    if lengths is not None:
        every.append((jnp.arange(context_length) < lengths[:, None])[:, None])
    return functools.reduce(jnp.logical_and, every) if every else None


def _xla(
    query: Heads,
    key: Float[Array, "b m g e"],
    value: Float[Array, "b m g e"],
    seen: Bool[Array, "#b #n m"] | Bool[Array, "n m"] | None,
    bias: Float[Array, "k n m"] | None,
    scale: float,
) -> Heads:
    repeats = query.shape[2] // key.shape[2]
    if repeats > 1:
        key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
    scores = jnp.einsum("bnke,bmke->bknm", query, key, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        scores += bias.astype(jnp.float32)
    weights = nn.softmax(scores, axis=-1, where=None if seen is None else seen[..., None, :, :]).astype(value.dtype)
    return jnp.einsum("bknm,bmke->bnke", weights, value)


def _splash(
    query: Heads,
    key: Float[Array, "b m g e"],
    value: Float[Array, "b m g e"],
    is_causal: bool,
    lengths: Int[Array, " b"] | None,
    scale: float,
    interpret: bool,
) -> Heads:
    length, context_length = query.shape[1], key.shape[1]
    (block_q, padded_q), (block_kv, padded_kv) = _block(length), _block(context_length)
    if padded_kv > context_length and lengths is None:
        lengths = jnp.full(len(query), context_length)

    def segments(length: Int[Array, ""]) -> splash.SegmentIds:
        # A key is seen by the queries that have its number.
        seen = jnp.arange(padded_kv) < length
        return splash.SegmentIds(jnp.ones(padded_q, jnp.int32), seen.astype(jnp.int32))

    def local(query: Array, key: Array, value: Array, *lengths: Int[Array, " b"]) -> Array:
        kernel = _splash_kernel(query.shape[2], padded_q, padded_kv, block_q, block_kv, is_causal, interpret)
        # The kernel does not scale the scores. The scale of 64 channels, 1/8, is exact in any type.
        query = _padded(query * scale, padded_q).swapaxes(1, 2)
        key, value = (_padded(x, padded_kv).swapaxes(1, 2) for x in (key, value))
        attended = jax.vmap(kernel)(query, key, value, *map(jax.vmap(segments), lengths))
        return attended.swapaxes(1, 2)[:, :length]

    return _on_each_device(local)(query, key, value, *(() if lengths is None else (lengths,)))


def _block(length: int) -> tuple[int, int]:
    """The positions that the kernel holds at a time, and the length that it is padded to."""
    for block in _BLOCKS:
        if length % block == 0:
            return block, length
    ends = {block: -(-length // block) * block for block in _BLOCKS}
    block = next((block for block, end in ends.items() if end - length <= _MOST_PADDING * length), _BLOCKS[-1])
    return block, ends[block]


def _padded(x: Array, length: int) -> Array:
    return x if x.shape[1] == length else jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))


def _splash_kernel(
    heads: int, length: int, context_length: int, block_q: int, block_kv: int, is_causal: bool, interpret: bool
) -> Callable:
    """The kernel of `heads` of queries; those of the keys, which may be fewer, are those of its arguments."""
    one = (masks.CausalMask if is_causal else masks.FullMask)((length, context_length))
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    mask = masks.MultiHeadMask([one] * heads)
    return splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)


def _on_each_device(function: Callable[..., Heads]) -> Callable[..., Heads]:
    """The function of a device's heads: the compiler splits a batch and heads by itself, but never a Pallas kernel.

    Where a mesh splits heads over `tensor`, each device takes its own; a number of heads that does not divide is
    attended to by all of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    left = {axis for axis in mesh.axis_names if axis not in mesh.manual_axes and mesh.shape[axis] > 1}
    if not left:
        return function

    def divided(query: Heads, key: Heads, value: Heads, *lengths: Int[Array, " b"]) -> Heads:
        split = P(None, None, "tensor") if key.shape[2] % mesh.shape["tensor"] == 0 else P()
        return jax.shard_map(
            function,
            in_specs=(split, split, split, *(P() for _ in lengths)),
            out_specs=split,
            axis_names=left,
            check_vma=False,
        )(query, key, value, *lengths)

    return divided
