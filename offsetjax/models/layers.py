"""What transformers are built of: modulation, gated layers, attention of one stream and of two, patches.

Parameters have the names of PyTorch's modules, which `formats/names.py` translates one to one; where two models call
the same thing by different names, the names are arguments. All compute in `dtype`, but norms, softmax, rotations and
the sinusoids of times, which are float32 inside. The sources: SwiGLU (arXiv 2002.05202),
normalised queries and keys (arXiv 2302.05442), adaptive layer norm (arXiv 2212.09748), joint attention over text and
picture (arXiv 2403.03206).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from offsetjax.models.attention import attend_by_head
from offsetjax.models.norms import RMSNorm, layer_norm
from offsetjax.models.rotary import Rotation, rotated


def modulated(
    x: Float[Array, "b n d"], scale: Float[Array, "#b d"], shift: Float[Array, "#b d"] | None = None
) -> Float[Array, "b n d"]:
    """x (1 + scale) + shift, of an example's own scale and shift."""
    scaled = x * (1 + scale[:, None])
    return scaled if shift is None else scaled + shift[:, None]


def gated(
    x: Float[Array, "b n d"],
    modulation: Sequence[Float[Array, "#b d"]],
    layer: Callable[[Float[Array, "b n d"]], Float[Array, "b n d"]],
    epsilon: float,
) -> Float[Array, "b n d"]:
    """x + gate · layer(norm(x) (1 + scale) + shift).

    Args:
        modulation: an example's shift, scale and gate.
        epsilon: of the norm.
    """
    shift, scale, gate = modulation
    return x + gate[:, None] * layer(modulated(layer_norm(x, epsilon), scale, shift))


def linear(features: int, dtype: Any, name: str) -> nn.Dense:
    """A layer without a bias."""
    return nn.Dense(features, use_bias=False, dtype=dtype, name=name)


def embedded_patches(latents: Float[Array, "b c h w"], width: int, size: int, dtype: Any) -> Float[Array, "b n d"]:
    """The patches of a picture, row by row, by a convolution `proj` of the module that calls it.

    Raises:
        ValueError: the sides are no multiples of the size.
    """
    count, _, height, long = latents.shape
    if height % size or long % size:
        raise ValueError(f"latents of {height} x {long} do not divide into patches of {size}")
    proj = nn.Conv(width, (size, size), (size, size), "VALID", dtype=dtype, name="proj")
    return proj(latents.transpose(0, 2, 3, 1)).reshape(count, -1, width)


def sinusoids(times: Float[Array, " b"], channels: int, is_closed: bool = False) -> Float[Array, "b c"]:
    """Cosines, then sines, of each time at frequencies from 1 down to 1 / 10,000, in float32.

    Args:
        is_closed: whether 1 / 10,000 is one of them.
    """
    half = channels // 2
    frequencies = jnp.exp(-math.log(10_000) / (half - is_closed) * jnp.arange(half, dtype=jnp.float32))
    angles = times.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def place_embedding(
    channels: int, rows: Float[np.ndarray, " h"], columns: Float[np.ndarray, " w"]
) -> Float[np.ndarray, "h*w d"]:
    """The embedding of a patch's position (arXiv 2010.11929), row by row: sines, cosines of its column, then row."""
    frequencies = 10_000.0 ** -(np.arange(channels // 4) / (channels / 4))

    def of(places: np.ndarray) -> np.ndarray:
        angles = places.reshape(-1, 1) * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)

    by_row, by_column = np.meshgrid(rows, columns, indexing="ij")
    return np.concatenate([of(by_column), of(by_row)], axis=-1).astype(np.float32)


class Perceptron(nn.Module):
    """Two linear layers with SiLU between them.

    Attributes:
        names: of the two.
    """

    hidden: int
    features: int
    dtype: Any
    names: tuple[str, str] = ("linear_1", "linear_2")
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b c"]) -> Float[Array, "b d"]:
        """The second layer's output."""
        first, second = self.names
        hidden = nn.silu(nn.Dense(self.hidden, self.use_bias, dtype=self.dtype, name=first)(x))
        return nn.Dense(self.features, self.use_bias, dtype=self.dtype, name=second)(hidden)


class Modulation(nn.Module):
    """`parts` of a block's conditioning (arXiv 2212.09748), each as wide as a token: scales, shifts and gates."""

    width: int
    parts: int
    dtype: Any
    use_bias: bool = True

    @nn.compact
    def __call__(self, condition: Float[Array, "b c"]) -> list[Float[Array, "b d"]]:
        """The parts, in the order of the kernel's columns."""
        projection = nn.Dense(self.parts * self.width, self.use_bias, dtype=self.dtype, name="linear")
        return jnp.split(projection(nn.silu(condition)), self.parts, axis=-1)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)), without biases.

    Attributes:
        names: of gate, up and down; where gate and up are one layer, gate first, of that and down.
    """

    hidden: int
    dtype: Any
    names: tuple[str, ...]

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """The output, as wide as x."""
        *inward, down = self.names
        width = 2 * self.hidden // len(inward)
        projected = [nn.Dense(width, use_bias=False, dtype=self.dtype, name=name)(x) for name in inward]
        gate, up = projected if len(projected) == 2 else jnp.split(projected[0], 2, axis=-1)
        return nn.Dense(x.shape[-1], use_bias=False, dtype=self.dtype, name=down)(nn.silu(gate) * up)


class FeedForward(nn.Module):
    """diffusers' `FeedForward`: a linear layer, GELU by its tanh approximation, another linear layer."""

    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """The output, as wide as x."""
        hidden = _Gelu(self.hidden, self.dtype, name="net_0")(x)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="net_2")(hidden)


class _Gelu(nn.Module):
    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n e"]:
        return nn.gelu(nn.Dense(self.features, dtype=self.dtype, name="proj")(x), approximate=True)


class Attention(nn.Module):
    """Attention of a sequence to itself.

    Attributes:
        heads: of queries; `key_heads` of keys and values, where they are fewer.
        channels: of a head.
        kernel: of `attention.py`.
        norm_epsilon: of the norms of queries and keys, a head at a time; None: there are none.
        names: of the projections to queries, keys, values and out, and of the two norms.
        is_interleaved: how the rotation pairs channels (`rotary.py`).
    """

    heads: int
    channels: int
    dtype: Any
    kernel: str = "xla"
    key_heads: int | None = None
    use_bias: bool = False
    norm_epsilon: float | None = None
    names: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out_0", "norm_q", "norm_k")
    is_interleaved: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        rotation: Rotation | None = None,
        *,
        lengths: Int[Array, " b"] | None = None,
        is_causal: bool = False,
    ) -> Float[Array, "b n d"]:
        """The output, as wide as x; the other arguments are those of `attend_by_head`."""
        to_query, to_key, to_value, to_out, norm_query, norm_key = self.names
        heads = {to_query: self.heads, to_key: self.key_heads or self.heads, to_value: self.key_heads or self.heads}
        query, key, value = (
            by_head(nn.Dense(count * self.channels, self.use_bias, dtype=self.dtype, name=name)(x), count)
            for name, count in heads.items()
        )
        if self.norm_epsilon is not None:
            query, key = (
                RMSNorm(self.norm_epsilon, name=norm_query)(query),
                RMSNorm(self.norm_epsilon, name=norm_key)(key),
            )
        if rotation is not None:
            query, key = (rotated(each, rotation, is_interleaved=self.is_interleaved) for each in (query, key))
        attended = attend_by_head(query, key, value, kernel=self.kernel, lengths=lengths, is_causal=is_causal)
        return nn.Dense(x.shape[-1], self.use_bias, dtype=self.dtype, name=to_out)(flat(attended))


class JointAttention(nn.Module):
    """Attention of a text and a picture, each with projections of its own, to both: text first.

    Attributes:
        is_last: the text's output is not projected, for nothing reads it.
        norm_epsilon, kernel: as those of `Attention`.
    """

    heads: int
    channels: int
    dtype: Any
    kernel: str = "xla"
    use_bias: bool = False
    norm_epsilon: float | None = None
    is_last: bool = False

    @nn.compact
    def __call__(
        self, text: Float[Array, "b m d"], picture: Float[Array, "b n d"], rotation: Rotation | None = None
    ) -> tuple[Float[Array, "b m d"], Float[Array, "b n d"]]:
        """What the text and the picture attend to.

        Args:
            rotation: of the text's positions, then the picture's.
        """
        of_text = self._projected(text, ("add_q_proj", "add_k_proj", "add_v_proj"), "norm_added_")
        of_picture = self._projected(picture, ("to_q", "to_k", "to_v"), "norm_")
        query, key, value = (jnp.concatenate(both, axis=1) for both in zip(of_text, of_picture, strict=True))
        if rotation is not None:
            query, key = (rotated(each, rotation, is_interleaved=True) for each in (query, key))
        attended = flat(attend_by_head(query, key, value, kernel=self.kernel))
        text, picture = attended[:, : text.shape[1]], attended[:, text.shape[1] :]
        width = self.heads * self.channels
        if not self.is_last:
            text = nn.Dense(width, self.use_bias, dtype=self.dtype, name="to_add_out")(text)
        return text, nn.Dense(width, self.use_bias, dtype=self.dtype, name="to_out_0")(picture)

    def _projected(self, x: Float[Array, "b n d"], names: tuple[str, str, str], norm: str) -> list[Array]:
        width = self.heads * self.channels
        query, key, value = (
            by_head(nn.Dense(width, self.use_bias, dtype=self.dtype, name=name)(x), self.heads) for name in names
        )
        if self.norm_epsilon is not None:
            query = RMSNorm(self.norm_epsilon, name=f"{norm}q")(query)
            key = RMSNorm(self.norm_epsilon, name=f"{norm}k")(key)
        return [query, key, value]


def by_head(x: Float[Array, "b n d"], heads: int) -> Float[Array, "b n k e"]:
    """The channels of each head, which stand side by side, on an axis of their own."""
    return x.reshape(*x.shape[:2], heads, -1)


def flat(x: Float[Array, "b n k e"]) -> Float[Array, "b n d"]:
    """The inverse of `by_head`."""
    return x.reshape(*x.shape[:2], -1)


def patches(latents: Float[Array, "b c h w"], size: int) -> Float[Array, "b n d"]:
    """The patches of a picture, row by row: within a patch row by row, all channels of a place together.

    Raises:
        ValueError: the sides are no multiples of the size.
    """
    batch, channels, height, width = latents.shape
    if height % size or width % size:
        raise ValueError(f"latents of {height} x {width} do not divide into patches of {size} x {size}")
    split = latents.reshape(batch, channels, height // size, size, width // size, size)
    return split.transpose(0, 2, 4, 3, 5, 1).reshape(batch, -1, size * size * channels)


def from_patches(tokens: Float[Array, "b n d"], height: int, width: int, size: int) -> Float[Array, "b c h w"]:
    """The inverse of `patches`; height and width are those of the latents."""
    split = tokens.reshape(len(tokens), height // size, width // size, size, size, -1)
    return split.transpose(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, height, width)
