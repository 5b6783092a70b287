"""Z-Image's denoiser (arXiv 2511.22699), with the names and the numerics of diffusers' `ZImageTransformer2DModel`.

Picture and text run through refiners of their own, two blocks each, then as one sequence through all others. Either is
filled up to a multiple of 32 with a learned token, which is attended to; what pads a batch beyond that is not. A block
is modulated by the time, the text's refiners are not:

    x += tanh(gate) · norm(attention(norm(x) (1 + scale)));    x += tanh(gate) · norm(feed_forward(norm(x) (1 + scale)))

Positions, on three axes: the text (1 … L, 0, 0) with L a multiple of 32, the picture (L + 1, row, column), what fills
the picture up (0, 0, 0).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from offsetjax.models.blocks import Blocks
from offsetjax.models.layers import Attention, Perceptron, SwiGLU, from_patches, modulated, patches, sinusoids
from offsetjax.models.norms import RMSNorm, layer_norm
from offsetjax.models.rotary import Rotation, grid_positions, rotation
from offsetjax.models.tracing import PLAIN, Tracing, traced
from offsetjax.parallel.sequence import split_over_devices
from offsetjax.parallel.sharding import split_layers

MULTIPLE = 32  # that both sequences are filled up to
_CONDITION = 256  # channels of the time at most
_TIME_HIDDEN = 1024
_ATTENTION_EPSILON = 1e-5  # of the norms of queries and keys
_NORMS = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")


class _Shape(NamedTuple):
    """What parameters and numerics depend on, by diffusers' names."""

    in_channels: int
    dim: int
    n_layers: int
    n_refiner_layers: int
    n_heads: int
    norm_eps: float
    qk_norm: bool
    cap_feat_dim: int
    rope_theta: float
    t_scale: float
    axes_dims: Sequence[int]
    patch_size: int


@dataclass(frozen=True)
class ZImageTransformer:
    """`init` and `apply`; `config` has diffusers' names and values.

    Attributes:
        tracing: how `apply` is traced in training.

    Raises:
        ValueError: the config is of another form: several patch sizes, grouped queries, or pictures as conditions.
    """

    config: Mapping[str, Any]
    dtype: Any
    tracing: Tracing = PLAIN
    class_name: str = "ZImageTransformer2DModel"
    sharding: ClassVar = split_layers("to_q|to_k|to_v|w1|w3", "to_out_0|w2")

    def __post_init__(self) -> None:
        config = self.config
        if len(config["all_patch_size"]) != 1 or tuple(config["all_f_patch_size"]) != (1,):
            raise ValueError("Z-Image: one patch size is known, of pictures, not of films")
        if config["n_kv_heads"] != config["n_heads"] or config.get("siglip_feat_dim"):
            raise ValueError("Z-Image: grouped queries, and pictures as conditions, are not known")

    def _module(self) -> nn.Module:
        fields = {"patch_size": self.config["all_patch_size"][0], **self.config}
        fields["axes_dims"] = tuple(fields["axes_dims"])
        shape = _Shape(**{name: fields[name] for name in _Shape._fields})
        return _Transformer(shape, jnp.dtype(self.dtype), self.tracing.kernel)

    def init(self, key: Key[Array, ""]) -> PyTree:
        """Random float32 parameters."""
        size = self.config["all_patch_size"][0]
        latents = jnp.zeros((1, self.config["in_channels"], size, size))
        text = jnp.zeros((1, 1, self.config["cap_feat_dim"]))
        return self._module().init(key, latents, jnp.zeros(1), text, jnp.ones(1, jnp.int32))["params"]

    def apply(
        self,
        params: PyTree,
        latents: Float[Array | np.ndarray, "b c h w"],
        timesteps: Float[Array | np.ndarray, " b"],
        encoder_hidden_states: Float[Array | np.ndarray, "b n d"],
        lengths: Int[Array | np.ndarray, " b"],
    ) -> Float[Array, "b c h w"]:
        """The prediction, computed in `dtype` and returned in float32.

        Args:
            timesteps: 1 - t, from 0 (noise) to 1 (data).
            lengths: tokens of each caption, at least 1; those beyond it are not read.

        Raises:
            ValueError: the sides of the latents are no multiples of the patches'.
        """
        latents, text = (jnp.asarray(x, self.dtype) for x in (latents, encoder_hidden_states))
        with traced(BLOCKS, self.tracing):
            output: Any = self._module().apply(
                {"params": params}, latents, jnp.asarray(timesteps), text, jnp.asarray(lengths)
            )
        return output.astype(jnp.float32)

    def attention_lengths(self, latent_pixels: int) -> tuple[int, ...]:
        """Of the attention of a picture of so many latent pixels, its text aside."""
        return (filled_length(latent_pixels // self.config["all_patch_size"][0] ** 2),)

    def torch_config(self) -> dict[str, Any]:
        """The `config.json` that PyTorch diffusers reads."""
        return {"_class_name": self.class_name, **self.config}


def filled_length(lengths: Any) -> Any:
    """The length, or each of an array of them, up to the next multiple of 32."""
    return -(-lengths // MULTIPLE) * MULTIPLE


class _Transformer(nn.Module):
    shape: _Shape
    dtype: Any
    kernel: str

    def setup(self) -> None:
        for name, count in (
            ("noise_refiner", self.shape.n_refiner_layers),
            ("context_refiner", self.shape.n_refiner_layers),
            ("layers", self.shape.n_layers),
        ):
            setattr(self, name, [ZImageBlock(self.shape, self.dtype, self.kernel) for _ in range(count)])

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "b c h w"],
        timesteps: Float[Array, " b"],
        text: Float[Array, "b n d"],
        lengths: Int[Array, " b"],
    ) -> Float[Array, "b c h w"]:
        shape, dtype = self.shape, self.dtype
        height, width = latents.shape[-2:]
        size, place = shape.patch_size, f"{shape.patch_size}-1"
        tokens = patches(latents, size)
        count, filled = tokens.shape[1], filled_length(lengths)
        of_text, of_picture = (
            rotation(positions, shape.axes_dims, shape.rope_theta, is_interleaved=True)
            for positions in _positions(text.shape[1], height // size, width // size, filled)
        )
        narrow = min(shape.dim, _CONDITION)
        embed_time = Perceptron(_TIME_HIDDEN, narrow, dtype, ("mlp_0", "mlp_2"), name="t_embedder")
        condition = embed_time(sinusoids(timesteps * shape.t_scale, _CONDITION))

        picture = nn.Dense(shape.dim, dtype=dtype, name=f"all_x_embedder.{place}")(tokens)
        picture = self._filled(picture, "x_pad_token", jnp.full(1, count))
        for block in self.noise_refiner:
            picture = block(picture, of_picture, None, condition)
        text = RMSNorm(shape.norm_eps, name="cap_embedder_0")(text)
        text = self._filled(nn.Dense(shape.dim, dtype=dtype, name="cap_embedder_1")(text), "cap_pad_token", lengths)
        for block in self.context_refiner:
            text = block(text, of_text, filled, None)

        both = jnp.concatenate([picture, text], axis=1)
        by = Rotation(*(jnp.concatenate(parts, axis=1) for parts in zip(of_picture, of_text, strict=True)))
        seen = picture.shape[1] + filled
        for block in self.layers:
            both = block(both, by, seen, condition)
        last = _Final(size**2 * shape.in_channels, dtype, name=f"all_final_layer.{place}")
        return from_patches(last(both[:, :count], condition), height, width, size)

    def _filled(self, tokens: Float[Array, "b n d"], name: str, lengths: Int[Array, "#b"]) -> Float[Array, "b m d"]:
        """The learned token of that name in place of all from `lengths` on, up to a multiple of 32."""
        token = self.param(name, nn.initializers.zeros, (1, self.shape.dim), jnp.float32).astype(tokens.dtype)
        count = filled_length(tokens.shape[1])
        padded = jnp.pad(tokens, ((0, 0), (0, count - tokens.shape[1]), (0, 0)))
        is_real = jnp.arange(count) < lengths[:, None]
        return jnp.where(is_real[..., None], padded, token)


def _positions(
    text_length: int, rows: int, columns: int, filled: Int[Array, " b"]
) -> tuple[Int[Array, "b m 3"], Int[Array, "b n 3"]]:
    """Of the text and of the picture, each filled up to a multiple of 32."""
    batch = len(filled)
    text = np.pad(np.arange(1, filled_length(text_length) + 1)[:, None], ((0, 0), (0, 2)))
    places = grid_positions(rows, columns)
    after = jnp.broadcast_to((filled + 1)[:, None, None], (batch, len(places), 1))
    picture = jnp.concatenate([after, jnp.broadcast_to(places, (batch, *places.shape))], axis=-1)
    empty = filled_length(len(places)) - len(places)
    return jnp.broadcast_to(text, (batch, *text.shape)), jnp.pad(picture, ((0, 0), (0, empty), (0, 0)))


class ZImageBlock(nn.Module):
    """One block, of a sequence's attention to itself and a gated layer."""

    shape: _Shape
    dtype: Any
    kernel: str

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        by: Rotation,
        lengths: Int[Array, " b"] | None,
        condition: Float[Array, "b e"] | None,
    ) -> Float[Array, "b n d"]:
        """The block's output.

        Args:
            by: the rotation of each position.
            lengths: of the sequences, where not all is seen.
            condition: of the time; a block without is not modulated, and has no parameters for it.
        """
        shape, width = self.shape, self.shape.dim
        scale, other_scale = [jnp.zeros((1, width), self.dtype)] * 2
        gate, other_gate = [jnp.ones((1, width), self.dtype)] * 2
        if condition is not None:
            modulation = nn.Dense(4 * width, dtype=self.dtype, name="adaLN_modulation_0")(condition)
            scale, gate, other_scale, other_gate = jnp.split(modulation, 4, axis=-1)
            gate, other_gate = jnp.tanh(gate), jnp.tanh(other_gate)
        attention = Attention(
            heads=shape.n_heads,
            channels=width // shape.n_heads,
            dtype=self.dtype,
            kernel=self.kernel,
            norm_epsilon=_ATTENTION_EPSILON if shape.qk_norm else None,
            name="attention",
        )
        feed_forward = SwiGLU(int(width / 3 * 8), self.dtype, ("w1", "w3", "w2"), name="feed_forward")
        norm = {name: RMSNorm(shape.norm_eps, name=name) for name in _NORMS}
        attended = attention(modulated(norm["attention_norm1"](x), scale), by, lengths=lengths)
        x = x + gate[:, None] * norm["attention_norm2"](attended)
        fed = feed_forward(modulated(norm["ffn_norm1"](x), other_scale))
        return split_over_devices(x + other_gate[:, None] * norm["ffn_norm2"](fed))


class _Final(nn.Module):
    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], condition: Float[Array, "b e"]) -> Float[Array, "b n f"]:
        scale = nn.Dense(x.shape[-1], dtype=self.dtype, name="adaLN_modulation_1")(nn.silu(condition))
        return nn.Dense(self.features, dtype=self.dtype, name="linear")(modulated(layer_norm(x), scale))


def _repeated(module: nn.Module) -> Sequence[nn.Module]:
    is_one = isinstance(module, ZImageBlock) and isinstance(module.parent, _Transformer)
    return getattr(module.parent, str(module.name).rpartition("_")[0]) if is_one else ()


BLOCKS = Blocks(attention=(Attention,), blocks=(ZImageBlock,), repeated=_repeated)
