"""Qwen3 as a text encoder (arXiv 2505.09388), with PyTorch transformers' names and numerics: dense, causal.

Z-Image and FLUX.2 klein read hidden states from its middle: state i is that after i layers, 0 the embedding of the
tokens, and the last one alone has the final norm. A caption is padded on the right; what pads it is seen by no token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from offsetjax.models.blocks import Blocks
from offsetjax.models.layers import Attention, SwiGLU
from offsetjax.models.norms import RMSNorm
from offsetjax.models.rotary import Rotation, rotation
from offsetjax.models.tracing import PLAIN, Tracing, traced
from offsetjax.parallel.sharding import split_layers

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
_FIXED = {"model_type": "qwen3", "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": True}


class _Shape(NamedTuple):
    """What parameters depend on, by transformers' names."""

    vocab_size: int
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float


@dataclass(frozen=True)
class Qwen3:
    """`init` and `apply`; `config` has transformers' names and values.

    Attributes:
        states: the numbers of the hidden states that `apply` gives, side by side within a token, in rising order.
        tracing: how `apply` is traced in training.
    """

    config: Mapping[str, Any]
    dtype: Any
    states: tuple[int, ...]
    tracing: Tracing = PLAIN
    class_name: str = "Qwen3ForCausalLM"
    sharding: ClassVar = split_layers("q_proj|k_proj|v_proj|gate_proj|up_proj", "o_proj|down_proj")

    @property
    def width(self) -> int:
        """Channels of a token that `apply` gives."""
        return len(self.states) * self.config["hidden_size"]

    def _module(self, states: Sequence[int]) -> nn.Module:
        shape = _Shape(**{name: self.config[name] for name in _Shape._fields})
        return _CausalModel(shape, tuple(states), jnp.dtype(self.dtype), self.tracing.kernel)

    def init(self, key: Key[Array, ""]) -> PyTree:
        """Random float32 parameters, also of layers that `states` has no need of."""
        module = self._module([self.config["num_hidden_layers"]])
        return module.init(key, jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32))["params"]

    def apply(
        self,
        params: PyTree,
        input_ids: Int[Array | np.ndarray, "b n"],
        lengths: Int[Array | np.ndarray, " b"] | None = None,
    ) -> Float[Array, "b n d"]:
        """The hidden states of the tokens, in `dtype`; also of those that pad a caption.

        Args:
            lengths: tokens of each caption, at least 1; by default those before the padding (`pad_token_id`).
        """
        input_ids = jnp.asarray(input_ids)
        if lengths is None:
            lengths = unpadded_lengths(input_ids, self.config["pad_token_id"])
        with traced(BLOCKS, self.tracing):
            states: Any = self._module(self.states).apply({"params": params}, input_ids, jnp.asarray(lengths))
        return jnp.concatenate(states, axis=-1)

    def torch_config(self) -> dict[str, Any]:
        """The `config.json` that transformers reads."""
        return {**_FIXED, **self.config, "architectures": [self.class_name]}


def unpadded_lengths(input_ids: Int[Array | np.ndarray, "b n"], pad_token_id: int) -> Int[Array, " b"]:
    """The tokens of each caption before the padding on its right, at least 1."""
    places = jnp.arange(1, input_ids.shape[1] + 1)
    return jnp.max(jnp.where(input_ids != pad_token_id, places, 1), axis=1)


class _CausalModel(nn.Module):
    """transformers' `Qwen3ForCausalLM`, whose head is the embedding."""

    shape: _Shape
    states: tuple[int, ...]
    dtype: Any
    kernel: str

    @nn.compact
    def __call__(self, input_ids: Int[Array, "b n"], lengths: Int[Array, " b"]) -> list[Float[Array, "b n d"]]:
        return _Model(self.shape, self.states, self.dtype, self.kernel, name="model")(input_ids, lengths)


class _Model(nn.Module):
    shape: _Shape
    states: tuple[int, ...]
    dtype: Any
    kernel: str

    def setup(self) -> None:
        shape = self.shape
        self.embed_tokens = nn.Embed(shape.vocab_size, shape.hidden_size, dtype=self.dtype)
        self.layers = [_Layer(shape, self.dtype, self.kernel) for _ in range(max(self.states))]
        if shape.num_hidden_layers in self.states:
            self.norm = RMSNorm(shape.rms_norm_eps)

    def __call__(self, input_ids: Int[Array, "b n"], lengths: Int[Array, " b"]) -> list[Float[Array, "b n d"]]:
        positions = jnp.arange(input_ids.shape[1])[:, None]
        by = rotation(positions, (self.shape.head_dim,), self.shape.rope_theta, is_interleaved=False)
        hidden = self.embed_tokens(input_ids)
        every = [hidden]
        for layer in self.layers:
            hidden = layer(hidden, by, lengths)
            every.append(hidden)
        last = self.shape.num_hidden_layers
        return [self.norm(every[state]) if state == last else every[state] for state in self.states]


class _Layer(nn.Module):
    shape: _Shape
    dtype: Any
    kernel: str

    @nn.compact
    def __call__(self, hidden: Float[Array, "b n d"], by: Rotation, lengths: Int[Array, " b"]) -> Float[Array, "b n d"]:
        shape = self.shape
        attention = Attention(
            heads=shape.num_attention_heads,
            channels=shape.head_dim,
            dtype=self.dtype,
            kernel=self.kernel,
            key_heads=shape.num_key_value_heads,
            norm_epsilon=shape.rms_norm_eps,
            names=_ATTENTION,
            is_interleaved=False,
            name="self_attn",
        )
        feed_forward = SwiGLU(shape.intermediate_size, self.dtype, ("gate_proj", "up_proj", "down_proj"), name="mlp")
        normalised = RMSNorm(shape.rms_norm_eps, name="input_layernorm")(hidden)
        hidden = hidden + attention(normalised, by, lengths=lengths, is_causal=True)
        return hidden + feed_forward(RMSNorm(shape.rms_norm_eps, name="post_attention_layernorm")(hidden))


def _repeated(module: nn.Module) -> Sequence[nn.Module]:
    """The layers from one hidden state that is read to the next."""
    if not isinstance(module, _Layer) or not isinstance(module.parent, _Model):
        return ()
    layers, place = module.parent.layers, int(str(module.name).removeprefix("layers_"))
    bounds = sorted({0, len(layers), *module.parent.states})
    end = next(bound for bound in bounds if bound > place)
    return layers[max(bound for bound in bounds if bound <= place) : end]


BLOCKS = Blocks(attention=(Attention,), blocks=(_Layer,), repeated=_repeated)
