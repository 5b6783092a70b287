"""T5's encoder (arXiv 1910.10683; version 1.1 with gated layers), with PyTorch transformers' names and numerics.

Attention has no positions but a learned bias for each head and each distance between two tokens: distances share
buckets, the wider the further. The first layer holds the biases, and all layers add them to scores that are not scaled.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from offsetjax.models.attention import attend_by_head
from offsetjax.models.blocks import Blocks
from offsetjax.models.layers import by_head, flat, linear
from offsetjax.models.norms import RMSNorm
from offsetjax.models.tracing import PLAIN, Tracing, traced
from offsetjax.parallel.sharding import split_layers

_FIXED = {
    "model_type": "t5",
    "is_encoder_decoder": True,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


class _Shape(NamedTuple):
    """What parameters and numerics depend on, by transformers' names."""

    vocab_size: int
    num_layers: int
    d_model: int
    d_kv: int
    d_ff: int
    num_heads: int
    relative_attention_num_buckets: int
    relative_attention_max_distance: int
    layer_norm_epsilon: float
    feed_forward_proj: str


@dataclass(frozen=True)
class T5Encoder:
    """`init` and `apply`; `config` has transformers' names and values.

    Attributes:
        tracing: how `apply` is traced in training.

    Raises:
        ValueError: `feed_forward_proj` is neither `gated-gelu` (version 1.1) nor `relu` (version 1.0).
    """

    config: Mapping[str, Any]
    dtype: Any
    tracing: Tracing = PLAIN
    class_name: str = "T5EncoderModel"
    sharding: ClassVar = split_layers("SelfAttention/[qkv]|wi|wi_0|wi_1", "SelfAttention/o|wo")

    def __post_init__(self) -> None:
        if self.config["feed_forward_proj"] not in ("gated-gelu", "relu"):
            raise ValueError(f"T5: feed_forward_proj = {self.config['feed_forward_proj']!r} is not known")

    @property
    def width(self) -> int:
        """Channels of a token that `apply` gives."""
        return self.config["d_model"]

    def _module(self) -> nn.Module:
        return _Encoder(_Shape(**{name: self.config[name] for name in _Shape._fields}), jnp.dtype(self.dtype))

    def init(self, key: Key[Array, ""]) -> PyTree:
        """Random float32 parameters."""
        return self._module().init(key, jnp.zeros((1, 1), jnp.int32), None)["params"]

    def apply(
        self,
        params: PyTree,
        input_ids: Int[Array | np.ndarray, "b n"],
        lengths: Int[Array | np.ndarray, " b"] | None = None,
    ) -> Float[Array, "b n d"]:
        """The last hidden state of the tokens, in `dtype`.

        Args:
            lengths: tokens of each caption that the others see; by default all, padding too, as in Stable Diffusion 3.
        """
        given = None if lengths is None else jnp.asarray(lengths)
        with traced(BLOCKS, self.tracing):
            states: Any = self._module().apply({"params": params}, jnp.asarray(input_ids), given)
        return states

    def torch_config(self) -> dict[str, Any]:
        """The `config.json` that transformers reads."""
        return {**_FIXED, **self.config, "architectures": [self.class_name]}


def buckets(length: int, count: int, furthest: int) -> Int[np.ndarray, "n n"]:
    """The bucket of each query (rows) and key: half of all for keys that follow, half of those for one distance each.

    Args:
        count: of buckets.
        furthest: distances from there on share the last bucket.
    """
    distance = np.arange(length)[None] - np.arange(length)[:, None]
    half, exact = count // 2, count // 4
    # In float32, as in PyTorch: where a bucket begins, rounding decides.
    far = np.log(np.maximum(np.abs(distance), 1).astype(np.float32) / np.float32(exact))
    far = exact + (far / np.float32(np.log(furthest / exact)) * np.float32(half - exact)).astype(np.int64)
    near = np.where(np.abs(distance) < exact, np.abs(distance), np.minimum(far, half - 1))
    return near + np.where(distance > 0, half, 0)


class _Encoder(nn.Module):
    shape: _Shape
    dtype: Any

    @nn.compact
    def __call__(self, input_ids: Int[Array, "b n"], lengths: Int[Array, " b"] | None) -> Float[Array, "b n d"]:
        hidden = nn.Embed(self.shape.vocab_size, self.shape.d_model, dtype=self.dtype, name="shared")(input_ids)
        return _Stack(self.shape, self.dtype, name="encoder")(hidden, lengths)


class _Stack(nn.Module):
    shape: _Shape
    dtype: Any

    @nn.compact
    def __call__(self, hidden: Float[Array, "b n d"], lengths: Int[Array, " b"] | None) -> Float[Array, "b n d"]:
        bias = None
        for place in range(self.shape.num_layers):
            hidden, bias = _Block(self.shape, self.dtype, name=f"block_{place}")(hidden, bias, lengths)
        return RMSNorm(self.shape.layer_norm_epsilon, name="final_layer_norm")(hidden)


class _Block(nn.Module):
    shape: _Shape
    dtype: Any

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "b n d"], bias: Float[Array, "k n n"] | None, lengths: Int[Array, " b"] | None
    ) -> tuple[Float[Array, "b n d"], Float[Array, "k n n"]]:
        hidden, bias = _Attends(self.shape, self.dtype, name="layer_0")(hidden, bias, lengths)
        return _Feeds(self.shape, self.dtype, name="layer_1")(hidden), bias


class _Attends(nn.Module):
    shape: _Shape
    dtype: Any

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "b n d"], bias: Float[Array, "k n n"] | None, lengths: Int[Array, " b"] | None
    ) -> tuple[Float[Array, "b n d"], Float[Array, "k n n"]]:
        normalised = RMSNorm(self.shape.layer_norm_epsilon, name="layer_norm")(hidden)
        attended, bias = _SelfAttention(self.shape, self.dtype, name="SelfAttention")(normalised, bias, lengths)
        return hidden + attended, bias


class _SelfAttention(nn.Module):
    shape: _Shape
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], bias: Float[Array, "k n n"] | None, lengths: Int[Array, " b"] | None
    ) -> tuple[Float[Array, "b n d"], Float[Array, "k n n"]]:
        shape = self.shape
        count = shape.relative_attention_num_buckets
        if bias is None:
            places = buckets(x.shape[1], count, shape.relative_attention_max_distance)
            bias = nn.Embed(count, shape.num_heads, name="relative_attention_bias")(places).transpose(2, 0, 1)
        query, key, value = (
            by_head(linear(shape.num_heads * shape.d_kv, self.dtype, name)(x), shape.num_heads) for name in "qkv"
        )
        attended = flat(attend_by_head(query, key, value, lengths=lengths, bias=bias, scale=1.0))
        return linear(x.shape[-1], self.dtype, "o")(attended), bias


class _Feeds(nn.Module):
    shape: _Shape
    dtype: Any

    @nn.compact
    def __call__(self, hidden: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        normalised = RMSNorm(self.shape.layer_norm_epsilon, name="layer_norm")(hidden)
        return hidden + _FeedForward(self.shape, self.dtype, name="DenseReluDense")(normalised)


class _FeedForward(nn.Module):
    shape: _Shape
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        def inward(name: str) -> Float[Array, "b n e"]:
            return linear(self.shape.d_ff, self.dtype, name)(x)

        is_gated = self.shape.feed_forward_proj == "gated-gelu"
        hidden = nn.gelu(inward("wi_0"), approximate=True) * inward("wi_1") if is_gated else nn.relu(inward("wi"))
        return linear(x.shape[-1], self.dtype, "wo")(hidden)


BLOCKS = Blocks(attention=(_SelfAttention,), blocks=(_Block,))
