"""FLUX.2's denoiser (Black Forest Labs 2025), with the names and the numerics of diffusers' `Flux2Transformer2DModel`.

Text and picture run through double blocks, each with weights of its own but for a common attention, then side by side
through single blocks, in which attention and feed-forward layer are parallel (arXiv 2302.05442). All double blocks have
one modulation by the time, all single blocks another:

    double   x += gate · attention(norm(x) (1 + scale) + shift);   x += gate · feed_forward(norm(x) (1 + scale) + shift)
    single   x += gate · out([attention, feed_forward](norm(x) (1 + scale) + shift))

Positions, on four axes: the text (0, 0, 0, place), the picture (0, row, column, 0). All text is attended to, padding
too. Latents are those of FLUX.2's autoencoder, packed (`kl_autoencoder.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from offsetjax.models.attention import attend_by_head
from offsetjax.models.blocks import Blocks
from offsetjax.models.layers import (
    JointAttention,
    Modulation,
    Perceptron,
    SwiGLU,
    by_head,
    flat,
    from_patches,
    gated,
    linear,
    modulated,
    patches,
    sinusoids,
)
from offsetjax.models.norms import RMSNorm, layer_norm
from offsetjax.models.rotary import Rotation, grid_positions, rotated, rotation
from offsetjax.models.tracing import PLAIN, Tracing, traced
from offsetjax.parallel.sequence import split_over_devices
from offsetjax.parallel.sharding import split_layers

_TIME_SCALE = 1000.0  # from times in [0, 1]
# Of picture, text, and both: a shift, a scale and a gate for each of attention and feed-forward layer, or for the two.
_MODULATIONS = {"double_stream_modulation_img": 6, "double_stream_modulation_txt": 6, "single_stream_modulation": 3}


class _Shape(NamedTuple):
    """What parameters and numerics depend on, by diffusers' names."""

    in_channels: int
    num_layers: int
    num_single_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int
    timestep_guidance_channels: int
    mlp_ratio: float
    axes_dims_rope: tuple[int, ...]
    rope_theta: float
    eps: float
    guidance_embeds: bool

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim


@dataclass(frozen=True)
class Flux2Transformer:
    """`init` and `apply`; `config` has diffusers' names and values.

    Attributes:
        tracing: how `apply` is traced in training.

    Raises:
        ValueError: the config is of another form: patches, or other channels out than in.
    """

    config: Mapping[str, Any]
    dtype: Any
    tracing: Tracing = PLAIN
    class_name: str = "Flux2Transformer2DModel"
    sharding: ClassVar = split_layers(
        "to_q|to_k|to_v|add_q_proj|add_k_proj|add_v_proj|linear_in", "to_out_0|to_add_out|linear_out"
    )

    def __post_init__(self) -> None:
        config = self.config
        if config["patch_size"] != 1 or (config.get("out_channels") or config["in_channels"]) != config["in_channels"]:
            raise ValueError("FLUX.2: patches, and other channels out than in, are not known")

    def _module(self) -> nn.Module:
        fields = {**self.config, "axes_dims_rope": tuple(self.config["axes_dims_rope"])}
        return _Transformer(
            _Shape(**{name: fields[name] for name in _Shape._fields}), jnp.dtype(self.dtype), self.tracing.kernel
        )

    def init(self, key: Key[Array, ""]) -> PyTree:
        """Random float32 parameters."""
        latents = jnp.zeros((1, self.config["in_channels"], 1, 1))
        text = jnp.zeros((1, 1, self.config["joint_attention_dim"]))
        guidance = jnp.zeros(1) if self.config["guidance_embeds"] else None
        return self._module().init(key, latents, jnp.zeros(1), text, guidance)["params"]

    def apply(
        self,
        params: PyTree,
        latents: Float[Array | np.ndarray, "b c h w"],
        timesteps: Float[Array | np.ndarray, " b"],
        encoder_hidden_states: Float[Array | np.ndarray, "b n d"],
        guidance: Float[Array | np.ndarray, " b"] | None = None,
    ) -> Float[Array, "b c h w"]:
        """The prediction, noise - data, computed in `dtype` and returned in float32.

        Args:
            timesteps: t, from 0 (data) to 1 (noise).
            guidance: the scale that a model with `guidance_embeds` was distilled to draw with.

        Raises:
            ValueError: guidance is missing, or the model takes none.
        """
        if (guidance is None) == self.config["guidance_embeds"]:
            raise ValueError("FLUX.2: guidance goes with guidance_embeds, and with nothing else")
        latents, text = (jnp.asarray(x, self.dtype) for x in (latents, encoder_hidden_states))
        given = None if guidance is None else jnp.asarray(guidance)
        with traced(BLOCKS, self.tracing):
            output: Any = self._module().apply({"params": params}, latents, jnp.asarray(timesteps), text, given)
        return output.astype(jnp.float32)

    def attention_lengths(self, latent_pixels: int) -> tuple[int, ...]:
        """Of the attention of a picture of so many latent pixels, packed, its text aside."""
        return (latent_pixels,)

    def torch_config(self) -> dict[str, Any]:
        """The `config.json` that PyTorch diffusers reads."""
        return {"_class_name": self.class_name, **self.config}


class _Transformer(nn.Module):
    shape: _Shape
    dtype: Any
    kernel: str

    def setup(self) -> None:
        shape, arguments = self.shape, (self.shape, self.dtype, self.kernel)
        self.transformer_blocks = [DoubleBlock(*arguments) for _ in range(shape.num_layers)]
        self.single_transformer_blocks = [SingleBlock(*arguments) for _ in range(shape.num_single_layers)]

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "b c h w"],
        timesteps: Float[Array, " b"],
        text: Float[Array, "b n d"],
        guidance: Float[Array, " b"] | None,
    ) -> Float[Array, "b c h w"]:
        shape = self.shape
        height, width = latents.shape[-2:]
        condition = _Condition(shape, self.dtype, name="time_guidance_embed")(timesteps, guidance)
        of_picture, of_text, of_both = (
            Modulation(shape.width, parts, self.dtype, use_bias=False, name=name)(condition)
            for name, parts in _MODULATIONS.items()
        )
        picture = linear(shape.width, self.dtype, "x_embedder")(patches(latents, 1))
        text = linear(shape.width, self.dtype, "context_embedder")(text)
        count = text.shape[1]
        positions = _positions(count, height, width)
        by = rotation(positions, shape.axes_dims_rope, shape.rope_theta, is_interleaved=True)
        for double in self.transformer_blocks:
            text, picture = double((text, picture), by, of_text, of_picture)
        both = jnp.concatenate([text, picture], axis=1)
        for single in self.single_transformer_blocks:
            both = single(both, by, of_both)
        scale, shift = Modulation(shape.width, 2, self.dtype, use_bias=False, name="norm_out")(condition)
        picture = modulated(layer_norm(both[:, count:], shape.eps), scale, shift)
        return from_patches(linear(shape.in_channels, self.dtype, "proj_out")(picture), height, width, 1)


def _hidden(shape: _Shape) -> int:
    return int(shape.width * shape.mlp_ratio)


def _positions(text_length: int, rows: int, columns: int) -> Int[np.ndarray, "n 4"]:
    """Of the text, then of the picture."""
    text = np.pad(np.arange(text_length)[:, None], ((0, 0), (3, 0)))
    return np.concatenate([text, np.pad(grid_positions(rows, columns), ((0, 0), (1, 1)))])


class _Condition(nn.Module):
    """The blocks' conditioning: the time and the guidance."""

    shape: _Shape
    dtype: Any

    @nn.compact
    def __call__(self, timesteps: Float[Array, " b"], guidance: Float[Array, " b"] | None) -> Float[Array, "b d"]:
        embedded = self._embedded(timesteps, "timestep_embedder")
        return embedded if guidance is None else embedded + self._embedded(guidance, "guidance_embedder")

    def _embedded(self, value: Float[Array, " b"], name: str) -> Float[Array, "b d"]:
        width = self.shape.width
        embedded = sinusoids(_TIME_SCALE * value, self.shape.timestep_guidance_channels)
        return Perceptron(width, width, self.dtype, use_bias=False, name=name)(embedded)


class DoubleBlock(nn.Module):
    """Text and picture, each with weights of its own, in a common attention."""

    shape: _Shape
    dtype: Any
    kernel: str

    @nn.compact
    def __call__(
        self,
        streams: tuple[Float[Array, "b m d"], Float[Array, "b n d"]],
        by: Rotation,
        of_text: list[Float[Array, "b d"]],
        of_picture: list[Float[Array, "b d"]],
    ) -> tuple[Float[Array, "b m d"], Float[Array, "b n d"]]:
        """The text and the picture after the block.

        Args:
            streams: the text and the picture.
            by: the rotation of the text's positions, then of the picture's.
            of_text, of_picture: shift, scale and gate of the attention, and of the feed-forward layer.
        """
        shape = self.shape
        attention = JointAttention(
            heads=shape.num_attention_heads,
            channels=shape.attention_head_dim,
            dtype=self.dtype,
            kernel=self.kernel,
            norm_epsilon=shape.eps,
            name="attn",
        )
        text, picture = streams
        attended_text, attended_picture = attention(
            modulated(layer_norm(text, shape.eps), of_text[1], of_text[0]),
            modulated(layer_norm(picture, shape.eps), of_picture[1], of_picture[0]),
            by,
        )
        text, picture = text + of_text[2][:, None] * attended_text, picture + of_picture[2][:, None] * attended_picture
        return self._fed(text, of_text[3:], "ff_context"), self._fed(picture, of_picture[3:], "ff")

    def _fed(self, x: Float[Array, "b n d"], modulation: list[Float[Array, "b d"]], name: str) -> Float[Array, "b n d"]:
        feed_forward = SwiGLU(_hidden(self.shape), self.dtype, ("linear_in", "linear_out"), name=name)
        return split_over_devices(gated(x, modulation, feed_forward, self.shape.eps))


class SingleBlock(nn.Module):
    """Text and picture as one sequence; attention beside the feed-forward layer."""

    shape: _Shape
    dtype: Any
    kernel: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], by: Rotation, of_both: list[Float[Array, "b d"]]
    ) -> Float[Array, "b n d"]:
        """The sequence after the block; the other arguments are as those of `DoubleBlock`."""
        parallel = _Parallel(self.shape, self.dtype, self.kernel, name="attn")
        return split_over_devices(gated(x, of_both, lambda normalised: parallel(normalised, by), self.shape.eps))


class _Parallel(nn.Module):
    """Queries, keys, values and the gated layer from one kernel, and to the output through one."""

    shape: _Shape
    dtype: Any
    kernel: str

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], by: Rotation) -> Float[Array, "b n d"]:
        shape, width = self.shape, self.shape.width
        hidden = _hidden(shape)
        projected = linear(3 * width + 2 * hidden, self.dtype, "to_qkv_mlp_proj")(x)
        *heads, gate, up = jnp.split(projected, np.cumsum([width, width, width, hidden]), axis=-1)
        query, key, value = (by_head(each, shape.num_attention_heads) for each in heads)
        query, key = RMSNorm(shape.eps, name="norm_q")(query), RMSNorm(shape.eps, name="norm_k")(key)
        query, key = (rotated(each, by, is_interleaved=True) for each in (query, key))
        attended = flat(attend_by_head(query, key, value, kernel=self.kernel))
        return linear(width, self.dtype, "to_out")(jnp.concatenate([attended, nn.silu(gate) * up], axis=-1))


def _repeated(module: nn.Module) -> Sequence[nn.Module]:
    parent = module.parent
    if not isinstance(parent, _Transformer) or not isinstance(module, DoubleBlock | SingleBlock):
        return ()
    return parent.transformer_blocks if isinstance(module, DoubleBlock) else parent.single_transformer_blocks


BLOCKS = Blocks(attention=(JointAttention, _Parallel), blocks=(DoubleBlock, SingleBlock), repeated=_repeated)
