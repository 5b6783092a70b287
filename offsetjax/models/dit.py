"""A class-conditional diffusion transformer: DiT (arXiv 2212.09748), trained from scratch as SiT (2401.08740).

The plain recipe is that of the papers, and is diffusers' `DiTTransformer2DModel`; what has proved itself since are
settings: normalised queries and keys (`qk_norm`, arXiv 2302.05442), rotary positions in place of added ones
(`rotary_theta`, arXiv 2104.09864), gated layers of as many parameters (`is_gated`, arXiv 2002.05202).

    x += gate · attention(norm(x) (1 + scale) + shift);    x += gate · feed_forward(norm(x) (1 + scale) + shift)

At first every gate and the output are 0.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int, Key, PyTree

from offsetjax.models.blocks import Blocks
from offsetjax.models.layers import (
    Attention,
    FeedForward,
    Modulation,
    Perceptron,
    SwiGLU,
    embedded_patches,
    from_patches,
    gated,
    modulated,
    place_embedding,
    sinusoids,
)
from offsetjax.models.norms import layer_norm
from offsetjax.models.rotary import Rotation, grid_positions, rotation
from offsetjax.models.tracing import PLAIN, Tracing, traced
from offsetjax.parallel.sequence import split_over_devices
from offsetjax.parallel.sharding import split_layers

_EPSILON = 1e-6  # of all norms
_TIME_CHANNELS = 256
_FIXED = {"norm_type": "ada_norm_zero", "norm_eps": _EPSILON, "activation_fn": "gelu-approximate"}
# Layers, heads, and channels a head, of the paper's sizes, and of a larger one of 3 billion parameters.
SIZES = {"S": (12, 6, 64), "B": (12, 12, 64), "L": (24, 16, 64), "XL": (28, 16, 72), "3B": (40, 16, 128)}


class _Shape(NamedTuple):
    """What parameters and numerics depend on: by diffusers' names, but the last three, which are settings of ours."""

    sample_size: int
    patch_size: int
    in_channels: int
    num_layers: int
    attention_head_dim: int
    num_attention_heads: int
    num_embeds_ada_norm: int
    qk_norm: bool
    rotary_theta: float
    is_gated: bool

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim


@dataclass(frozen=True)
class DiT:
    """`init` and `apply`; `config` has diffusers' names and values, and our settings.

    Attributes:
        tracing: how `apply` is traced in training.
    """

    config: Mapping[str, Any]
    dtype: Any
    tracing: Tracing = PLAIN
    class_name: str = "DiTTransformer2DModel"
    sharding: ClassVar = split_layers("to_q|to_k|to_v|net_0/proj|gate_proj|up_proj", "to_out_0|net_2|down_proj")

    @property
    def _shape(self) -> _Shape:
        fields = {"qk_norm": False, "rotary_theta": 0.0, "is_gated": False, **self.config}
        return _Shape(**{name: fields[name] for name in _Shape._fields})

    @property
    def is_plain(self) -> bool:
        """Whether it is diffusers' `DiTTransformer2DModel`, with none of the settings."""
        shape = self._shape
        return not (shape.qk_norm or shape.rotary_theta or shape.is_gated)

    def _module(self) -> nn.Module:
        return _Transformer(self._shape, jnp.dtype(self.dtype), self.tracing.kernel)

    def init(self, key: Key[Array, ""]) -> PyTree:
        """Random float32 parameters, as the paper draws them."""
        shape = self._shape
        latents = jnp.zeros((1, shape.in_channels, shape.patch_size, shape.patch_size))
        like = jax.eval_shape(self._module().init, key, latents, jnp.zeros(1), jnp.zeros(1, jnp.int32))["params"]
        return drawn(key, like)

    def apply(
        self,
        params: PyTree,
        latents: Float[Array | np.ndarray, "b c h w"],
        timesteps: Float[Array | np.ndarray, " b"],
        class_labels: Int[Array | np.ndarray, " b"],
    ) -> Float[Array, "b c h w"]:
        """The prediction, computed in `dtype` and returned in float32.

        Args:
            timesteps: 1000 t, from 0 (data) to 1000 (noise).
            class_labels: of the pictures, below `num_embeds_ada_norm`; that itself is no class, for guidance.

        Raises:
            ValueError: the sides of the latents do not divide into patches.
        """
        inputs = jnp.asarray(latents, self.dtype), jnp.asarray(timesteps), jnp.asarray(class_labels)
        with traced(BLOCKS, self.tracing):
            output: Any = self._module().apply({"params": params}, *inputs)
        return output.astype(jnp.float32)

    def attention_lengths(self, latent_pixels: int) -> tuple[int, ...]:
        """Of the attention of a picture of so many latent pixels."""
        return (latent_pixels // self.config["patch_size"] ** 2,)

    def torch_config(self) -> dict[str, Any]:
        """The `config.json` that PyTorch diffusers reads, which knows nothing of the settings.

        Raises:
            ValueError: there are some.
        """
        if not self.is_plain:
            raise ValueError("a DiT with qk_norm, rotary_theta or is_gated is no model that diffusers has")
        ours = ("qk_norm", "rotary_theta", "is_gated")
        return {"_class_name": self.class_name, **_FIXED, **{k: v for k, v in self.config.items() if k not in ours}}


def drawn(key: Key[Array, ""], like: PyTree) -> PyTree:
    """Parameters of a diffusion transformer before training, by their names (arXiv 2212.09748, 3.2).

    Modulations and the output are 0, for each block to begin as the identity; embeddings are N(0, 0.02²); all other
    kernels are uniform with a variance of 2 / (inputs + outputs), a patch's as one matrix; gains are 1, biases 0.

    Args:
        like: abstract parameters.
    """
    params = {}
    for path, leaf in flatten_dict(like).items():
        of_path = jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
        params[path] = _drawn(of_path, path, leaf.shape)
    return unflatten_dict(params)


def _drawn(key: Key[Array, ""], path: tuple[str, ...], shape: tuple[int, ...]) -> Array:
    if path[-1] == "scale":
        return jnp.ones(shape)
    is_zero = path[-2] == "linear" or path[0].startswith("proj_out")
    if path[-1] == "bias" or is_zero:
        return jnp.zeros(shape)
    if path[-1] == "embedding" or any("embedder" in name for name in path):
        return 0.02 * jax.random.normal(key, shape)
    bound = math.sqrt(6 / (math.prod(shape[:-1]) + shape[-1]))
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


class _Transformer(nn.Module):
    shape: _Shape
    dtype: Any
    kernel: str

    def setup(self) -> None:
        count = range(self.shape.num_layers)
        self.transformer_blocks = [DiTBlock(self.shape, self.dtype, self.kernel) for _ in count]

    @nn.compact
    def __call__(
        self, latents: Float[Array, "b c h w"], timesteps: Float[Array, " b"], class_labels: Int[Array, " b"]
    ) -> Float[Array, "b c h w"]:
        shape, width = self.shape, self.shape.width
        height, long = latents.shape[-2:]
        rows, columns = height // shape.patch_size, long // shape.patch_size
        condition = _Condition(shape, self.dtype, name="emb")(timesteps, class_labels)
        x = _Embed(width, shape.patch_size, self.dtype, name="pos_embed")(latents)
        by = None
        if shape.rotary_theta:
            half = shape.attention_head_dim // 4 * 2
            channels = (shape.attention_head_dim - half, half)
            by = rotation(grid_positions(rows, columns), channels, shape.rotary_theta, is_interleaved=True)
        else:
            # Positions are those of a square picture of `sample_size`, whatever the shape.
            side = shape.sample_size // shape.patch_size
            places = (np.arange(count) * side / count for count in (rows, columns))
            x = x + jnp.asarray(place_embedding(width, *places), self.dtype)
        for block in self.transformer_blocks:
            x = block(x, by, condition)
        shift, scale = jnp.split(
            nn.Dense(2 * width, dtype=self.dtype, name="proj_out_1")(nn.silu(condition)), 2, axis=-1
        )
        out = nn.Dense(shape.patch_size**2 * shape.in_channels, dtype=self.dtype, name="proj_out_2")
        return from_patches(out(modulated(layer_norm(x, _EPSILON), scale, shift)), height, long, shape.patch_size)


class _Embed(nn.Module):
    """The patches of a picture."""

    width: int
    size: int
    dtype: Any

    @nn.compact
    def __call__(self, latents: Float[Array, "b c h w"]) -> Float[Array, "b n d"]:
        return embedded_patches(latents, self.width, self.size, self.dtype)


class _Condition(nn.Module):
    """The blocks' conditioning: the time and the class."""

    shape: _Shape
    dtype: Any

    @nn.compact
    def __call__(self, timesteps: Float[Array, " b"], class_labels: Int[Array, " b"]) -> Float[Array, "b d"]:
        width = self.shape.width
        time = Perceptron(width, width, self.dtype, name="timestep_embedder")
        return time(sinusoids(timesteps, _TIME_CHANNELS, is_closed=True)) + _Classes(
            self.shape.num_embeds_ada_norm + 1, width, self.dtype, name="class_embedder"
        )(class_labels)


class _Classes(nn.Module):
    count: int
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, class_labels: Int[Array, " b"]) -> Float[Array, "b d"]:
        return nn.Embed(self.count, self.width, dtype=self.dtype, name="embedding_table")(class_labels)


class DiTBlock(nn.Module):
    """One block, of a picture's attention to itself and a feed-forward layer."""

    shape: _Shape
    dtype: Any
    kernel: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], by: Rotation | None, condition: Float[Array, "b d"]
    ) -> Float[Array, "b n d"]:
        """The block's output.

        Args:
            by: the rotation of each position, if any.
            condition: of the time and the class.
        """
        shape, width = self.shape, self.shape.width
        attention = Attention(
            heads=shape.num_attention_heads,
            channels=shape.attention_head_dim,
            dtype=self.dtype,
            kernel=self.kernel,
            use_bias=True,
            norm_epsilon=_EPSILON if shape.qk_norm else None,
            name="attn1",
        )
        if shape.is_gated:
            # Of about as many parameters as the layer without gates, in whole tiles of a TPU.
            hidden = round(8 * width / 3 / 128) * 128 or 128
            feed_forward: nn.Module = SwiGLU(hidden, self.dtype, ("gate_proj", "up_proj", "down_proj"), name="ff")
        else:
            feed_forward = FeedForward(4 * width, self.dtype, name="ff")
        modulation = Modulation(width, 6, self.dtype, name="norm1")(condition)
        x = gated(x, modulation[:3], lambda normalised: attention(normalised, by), _EPSILON)
        return split_over_devices(gated(x, modulation[3:], feed_forward, _EPSILON))


def _repeated(module: nn.Module) -> Sequence[nn.Module]:
    is_one = isinstance(module, DiTBlock) and isinstance(module.parent, _Transformer)
    return module.parent.transformer_blocks if is_one else ()  # type: ignore[union-attr]


BLOCKS = Blocks(attention=(Attention,), blocks=(DiTBlock,), repeated=_repeated)
