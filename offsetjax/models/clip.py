"""CLIP's text transformer (Radford et al. 2021, arXiv 2103.00020), with PyTorch's numerics and transformers' names.

    h_0     = token embedding + position embedding
    h_{i+1} = h_i + attention(norm1(h_i)), then + mlp(norm2(·))        pre-norm, causal attention
    pooled  = norm(h_L) at the end of the text, projected

The parameters' paths are transformers' tensor names: `text_model/encoder/layers/0/self_attn/q_proj/kernel` is
`text_model.encoder.layers.0.self_attn.q_proj.weight`. Matrices are multiplied in `dtype`; the embeddings, the sums of
the residual stream, the moments of the normalisations and the softmax are float32.
"""

from collections.abc import Callable
from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from offsetjax.models.attention import attend

# OpenAI's models have the first, OpenCLIP's the second.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu": lambda x: nn.gelu(x, approximate=False),
}
_EMBEDDING_INIT = _KERNEL_INIT = nn.initializers.normal(0.01)


@dataclass(frozen=True)
class ClipConfig:
    """The architecture, in transformers' names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    hidden_act: str
    projection_dim: int
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.num_hidden_layers < 1 or self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"{self.num_hidden_layers} layers of hidden_size = {self.hidden_size}, which must be a multiple of "
                f"num_attention_heads = {self.num_attention_heads}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act = {self.hidden_act!r}, which must be one of {', '.join(ACTIVATIONS)}")


class ClipText(nn.Module):
    """Token ids → the hidden states that a denoiser is given and, with `has_projection`, the caption as a whole.

    Attributes:
        dtype: that matrices are multiplied in; the parameters are float32.
        is_penultimate: the hidden states are those before the last layer, without the final normalisation.
        has_projection: whether there is a `text_projection`.
    """

    config: ClipConfig
    dtype: jnp.dtype
    is_penultimate: bool = False
    has_projection: bool = False

    def setup(self) -> None:
        self.text_model = _Transformer(self.config, self.dtype)
        if self.has_projection:
            self.text_projection = nn.Dense(self.config.projection_dim, use_bias=False, dtype=self.dtype)

    def __call__(self, input_ids: Int[Array, "b n"]) -> tuple[Float[Array, "b n d"], Float[Array, "b p"] | None]:
        """The hidden states, and the projected state of the end of each text, the token with the greatest id."""
        before, last = self.text_model(input_ids)
        hidden = before if self.is_penultimate else last
        if not self.has_projection:
            return hidden.astype(self.dtype), None
        # Each text's end from that text alone: an index over the batch would have the devices exchange their texts.
        end = jnp.argmax(input_ids, axis=1)[:, None, None]
        pooled = jnp.take_along_axis(last, end, axis=1)[:, 0]
        return hidden.astype(self.dtype), self.text_projection(pooled)


class _Transformer(nn.Module):
    config: ClipConfig
    dtype: jnp.dtype

    def setup(self) -> None:
        self.embeddings = _Embeddings(self.config)
        self.encoder = _Encoder(self.config, self.dtype)
        self.final_layer_norm = _layer_norm(self.config, self.dtype)

    def __call__(self, input_ids: Int[Array, "b n"]) -> tuple[Float[Array, "b n d"], Float[Array, "b n d"]]:
        """The states before the last layer, and those after it, normalised."""
        before, last = self.encoder(self.embeddings(input_ids))
        return before, self.final_layer_norm(last)


class _Embeddings(nn.Module):
    config: ClipConfig

    def setup(self) -> None:
        width = self.config.hidden_size
        self.token_embedding = nn.Embed(self.config.vocab_size, width, embedding_init=_EMBEDDING_INIT)
        self.position_embedding = nn.Embed(self.config.max_position_embeddings, width, embedding_init=_EMBEDDING_INIT)

    def __call__(self, input_ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        return self.token_embedding(input_ids) + self.position_embedding(positions)


class _Encoder(nn.Module):
    """One more scope in the parameters' names."""

    config: ClipConfig
    dtype: jnp.dtype

    def setup(self) -> None:
        self.layers = ClipLayers(self.config, self.dtype)

    def __call__(self, hidden: Float[Array, "b n d"]) -> tuple[Float[Array, "b n d"], Float[Array, "b n d"]]:
        return self.layers(hidden)


class ClipLayers(nn.Module):
    """The layers one after the other."""

    config: ClipConfig
    dtype: jnp.dtype

    def setup(self) -> None:
        self.layers = [ClipLayer(self.config, self.dtype, name=str(i)) for i in range(self.config.num_hidden_layers)]

    def __call__(self, hidden: Float[Array, "b n d"]) -> tuple[Float[Array, "b n d"], Float[Array, "b n d"]]:
        """What the last layer is given, and what it gives."""
        for layer in self.layers[:-1]:
            hidden = layer(hidden)
        return hidden, self.layers[-1](hidden)


class ClipLayer(nn.Module):
    """Attention to the tokens before, then two linear layers, each added to its input."""

    config: ClipConfig
    dtype: jnp.dtype

    def setup(self) -> None:
        self.layer_norm1 = _layer_norm(self.config, self.dtype)
        self.self_attn = ClipAttention(self.config.hidden_size, self.config.num_attention_heads, self.dtype)
        self.layer_norm2 = _layer_norm(self.config, self.dtype)
        self.mlp = _MLP(self.config, self.dtype)

    def __call__(self, hidden: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))
        return hidden + self.mlp(self.layer_norm2(hidden))


class ClipAttention(nn.Module):
    """Causal attention. Padding is attended to: Stable Diffusion's pipelines give CLIP no mask of it."""

    width: int
    heads: int
    dtype: jnp.dtype

    def setup(self) -> None:
        self.q_proj = _dense(self.width, self.dtype)
        self.k_proj = _dense(self.width, self.dtype)
        self.v_proj = _dense(self.width, self.dtype)
        self.out_proj = _dense(self.width, self.dtype)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, mask=causal))


class _MLP(nn.Module):
    config: ClipConfig
    dtype: jnp.dtype

    def setup(self) -> None:
        self.fc1 = _dense(self.config.intermediate_size, self.dtype)
        self.fc2 = _dense(self.config.hidden_size, self.dtype)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return self.fc2(ACTIVATIONS[self.config.hidden_act](self.fc1(x)))


def _dense(features: int, dtype: jnp.dtype) -> nn.Dense:
    return nn.Dense(features, dtype=dtype, kernel_init=_KERNEL_INIT)


def _layer_norm(config: ClipConfig, dtype: jnp.dtype) -> nn.LayerNorm:
    # E (x - E x)², as PyTorch has it: of CLIP's few channels with large values, E x² - (E x)² leaves less.
    return nn.LayerNorm(epsilon=config.layer_norm_eps, dtype=dtype, use_fast_variance=False)
