"""Stable Diffusion 3's denoiser (arXiv 2403.03206), with names and numerics of diffusers' `SD3Transformer2DModel`.

Text and picture run through blocks in which each has weights of its own, but for a common attention; 3.5 medium's first
blocks have a second attention of the picture to itself. Positions are added to the patches: a stored table, of which a
picture takes the middle. Blocks are modulated by the time and by the caption as a whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from offsetjax.models.blocks import Blocks
from offsetjax.models.layers import (
    Attention,
    FeedForward,
    JointAttention,
    Modulation,
    Perceptron,
    embedded_patches,
    from_patches,
    gated,
    modulated,
    place_embedding,
    sinusoids,
)
from offsetjax.models.norms import layer_norm
from offsetjax.models.tracing import PLAIN, Tracing, traced
from offsetjax.parallel.sequence import split_over_devices
from offsetjax.parallel.sharding import split_layers

_EPSILON = 1e-6  # of all norms
_TIME_CHANNELS = 256


class _Shape(NamedTuple):
    """What parameters and numerics depend on, by diffusers' names."""

    sample_size: int
    patch_size: int
    in_channels: int
    num_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int
    pooled_projection_dim: int
    out_channels: int
    pos_embed_max_size: int
    dual_attention_layers: tuple[int, ...]
    qk_norm: str | None

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim


@dataclass(frozen=True)
class SD3Transformer:
    """`init` and `apply`; `config` has diffusers' names and values.

    Attributes:
        tracing: how `apply` is traced in training.

    Raises:
        ValueError: the config is of another form.
    """

    config: Mapping[str, Any]
    dtype: Any
    tracing: Tracing = PLAIN
    class_name: str = "SD3Transformer2DModel"
    sharding: ClassVar = split_layers(
        "to_q|to_k|to_v|add_q_proj|add_k_proj|add_v_proj|net_0/proj", "to_out_0|to_add_out|net_2"
    )

    def __post_init__(self) -> None:
        if self.config.get("qk_norm") not in (None, "", "rms_norm"):
            raise ValueError(f"Stable Diffusion 3: qk_norm = {self.config['qk_norm']!r} is not known")
        if self.config["caption_projection_dim"] != self._shape.width:
            raise ValueError("Stable Diffusion 3: caption_projection_dim must be the width of a token")

    @property
    def _shape(self) -> _Shape:
        fields = {"qk_norm": None, **self.config}
        fields["dual_attention_layers"] = tuple(fields.get("dual_attention_layers") or ())
        return _Shape(**{name: fields[name] for name in _Shape._fields})

    def init(self, key: Key[Array, ""]) -> PyTree:
        """Random float32 parameters."""
        shape = self._shape
        latents = jnp.zeros((1, shape.in_channels, shape.patch_size, shape.patch_size))
        text, pooled = jnp.zeros((1, 1, shape.joint_attention_dim)), jnp.zeros((1, shape.pooled_projection_dim))
        return self._module().init(key, latents, jnp.zeros(1), text, pooled)["params"]

    def _module(self) -> nn.Module:
        return _Transformer(self._shape, jnp.dtype(self.dtype), self.tracing.kernel)

    def apply(
        self,
        params: PyTree,
        latents: Float[Array | np.ndarray, "b c h w"],
        timesteps: Float[Array | np.ndarray, " b"],
        encoder_hidden_states: Float[Array | np.ndarray, "b n d"],
        pooled_projections: Float[Array | np.ndarray, "b p"],
    ) -> Float[Array, "b c h w"]:
        """The prediction, noise - data, computed in `dtype` and returned in float32.

        Args:
            timesteps: 1000 t, from 0 (data) to 1000 (noise).
            encoder_hidden_states: of all text encoders, one after the other along the sequence.
            pooled_projections: of the captions as a whole.

        Raises:
            ValueError: the picture is larger than the table of positions, or its sides do not divide into patches.
        """
        given = (jnp.asarray(x, self.dtype) for x in (latents, encoder_hidden_states, pooled_projections))
        latents, text, pooled = given
        with traced(BLOCKS, self.tracing):
            output: Any = self._module().apply({"params": params}, latents, jnp.asarray(timesteps), text, pooled)
        return output.astype(jnp.float32)

    def attention_lengths(self, latent_pixels: int) -> tuple[int, ...]:
        """Of the attention of a picture of so many latent pixels, its text aside."""
        return (latent_pixels // self.config["patch_size"] ** 2,)

    def torch_config(self) -> dict[str, Any]:
        """The `config.json` that PyTorch diffusers reads."""
        return {"_class_name": self.class_name, **self.config, "qk_norm": self.config.get("qk_norm") or None}


class _Transformer(nn.Module):
    shape: _Shape
    dtype: Any
    kernel: str

    def setup(self) -> None:
        count = range(self.shape.num_layers)
        self.transformer_blocks = [SD3Block(self.shape, self.dtype, self.kernel, place) for place in count]

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "b c h w"],
        timesteps: Float[Array, " b"],
        text: Float[Array, "b n d"],
        pooled: Float[Array, "b p"],
    ) -> Float[Array, "b c h w"]:
        shape, width = self.shape, self.shape.width
        condition = _Condition(width, self.dtype, name="time_text_embed")(timesteps, pooled)
        picture = _Patches(shape, self.dtype, name="pos_embed")(latents)
        text = nn.Dense(width, dtype=self.dtype, name="context_embedder")(text)
        for block in self.transformer_blocks:
            text, picture = block((text, picture), condition)
        scale, shift = Modulation(width, 2, self.dtype, name="norm_out")(condition)
        features = shape.patch_size**2 * shape.out_channels
        picture = nn.Dense(features, dtype=self.dtype, name="proj_out")(
            modulated(layer_norm(picture, _EPSILON), scale, shift)
        )
        height, width = latents.shape[-2:]
        return from_patches(picture, height, width, shape.patch_size)


class _Condition(nn.Module):
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, timesteps: Float[Array, " b"], pooled: Float[Array, "b p"]) -> Float[Array, "b d"]:
        time = Perceptron(self.width, self.width, self.dtype, name="timestep_embedder")
        text = Perceptron(self.width, self.width, self.dtype, name="text_embedder")
        return time(sinusoids(timesteps, _TIME_CHANNELS)) + text(pooled)


class _Patches(nn.Module):
    """The patches of a picture with their positions."""

    shape: _Shape
    dtype: Any

    @nn.compact
    def __call__(self, latents: Float[Array, "b c h w"]) -> Float[Array, "b n d"]:
        size, most = self.shape.patch_size, self.shape.pos_embed_max_size
        rows, columns = (side // size for side in latents.shape[-2:])
        tokens = embedded_patches(latents, self.shape.width, size, self.dtype)
        if max(rows, columns) > most:
            raise ValueError(f"{rows} x {columns} patches are more than the {most} x {most} that have positions")
        table = self.param("pos_embed", self._initial, (1, most * most, self.shape.width))
        top, left = (most - rows) // 2, (most - columns) // 2
        grid = jax.lax.stop_gradient(table).reshape(most, most, -1)[top : top + rows, left : left + columns]
        return tokens + grid.reshape(1, rows * columns, -1).astype(self.dtype)

    def _initial(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "1 n d"]:
        most = self.shape.pos_embed_max_size
        places = np.arange(most) * (self.shape.sample_size // self.shape.patch_size) / most
        return jnp.asarray(place_embedding(shape[-1], places, places))[None]


class SD3Block(nn.Module):
    """Text and picture, each with weights of its own, in a common attention.

    Attributes:
        place: of the block among all; the last one's text ends in its attention.
    """

    shape: _Shape
    dtype: Any
    kernel: str
    place: int

    @nn.compact
    def __call__(
        self, streams: tuple[Float[Array, "b m d"], Float[Array, "b n d"]], condition: Float[Array, "b d"]
    ) -> tuple[Float[Array, "b m d"], Float[Array, "b n d"]]:
        """The text and the picture after the block."""
        text, picture = streams
        is_dual = self.place in self.shape.dual_attention_layers
        is_last = self.place == self.shape.num_layers - 1
        of_picture = self._modulation(9 if is_dual else 6, "norm1", condition)
        of_text = self._modulation(2 if is_last else 6, "norm1_context", condition)
        normalised = layer_norm(picture, _EPSILON)
        attention = JointAttention(**self._attention(), is_last=is_last, name="attn")
        scale, shift = of_text if is_last else (of_text[1], of_text[0])
        attended_text, attended = attention(
            modulated(layer_norm(text, _EPSILON), scale, shift), modulated(normalised, of_picture[1], of_picture[0])
        )
        picture = picture + of_picture[2][:, None] * attended
        if is_dual:
            shift, scale, gate = of_picture[6:]
            second = Attention(**self._attention(), name="attn2")
            picture = picture + gate[:, None] * second(modulated(normalised, scale, shift))
        picture = self._fed(picture, of_picture[3:6], "ff")
        if is_last:
            return text, picture
        return self._fed(text + of_text[2][:, None] * attended_text, of_text[3:], "ff_context"), picture

    def _modulation(self, parts: int, name: str, condition: Float[Array, "b d"]) -> list[Float[Array, "b d"]]:
        return Modulation(self.shape.width, parts, self.dtype, name=name)(condition)

    def _attention(self) -> dict[str, Any]:
        return {
            "heads": self.shape.num_attention_heads,
            "channels": self.shape.attention_head_dim,
            "dtype": self.dtype,
            "kernel": self.kernel,
            "use_bias": True,
            "norm_epsilon": _EPSILON if self.shape.qk_norm else None,
        }

    def _fed(self, x: Float[Array, "b n d"], modulation: list[Float[Array, "b d"]], name: str) -> Float[Array, "b n d"]:
        feed_forward = FeedForward(4 * self.shape.width, self.dtype, name=name)
        return split_over_devices(gated(x, modulation, feed_forward, _EPSILON))


def _repeated(module: nn.Module) -> Sequence[nn.Module]:
    """Those with a second attention, or those without; the last one's text ends."""
    parent = module.parent
    if not isinstance(module, SD3Block) or not isinstance(parent, _Transformer):
        return ()
    dual = module.shape.dual_attention_layers
    return [each for each in parent.transformer_blocks[:-1] if (each.place in dual) == (module.place in dual)]


BLOCKS = Blocks(attention=(JointAttention, Attention), blocks=(SD3Block,), repeated=_repeated)
