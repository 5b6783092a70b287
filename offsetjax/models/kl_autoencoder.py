"""An autoencoder of our own, with the names and the numerics of PyTorch diffusers' `AutoencoderKL` and its successors.

Stable Diffusion's, Stable Diffusion 3's and FLUX.1's (16 channels, a shift, no 1x1 convolutions between), and FLUX.2's
(`AutoencoderKLFlux2`: 32 channels). A denoiser has latents of mean 0 and standard deviation 1, about:

    (z - shift) · scale                          `scaling_factor` and `shift_factor` of the config
    (packed z - mean) / √(variance + ε)          FLUX.2: stored statistics, `bn`, which no training moves

Packed is a picture whose 2x2 places are channels of one, the channels of z slowest. FLUX.2's z is the posterior's mean.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from offsetjax.models.attention import attend
from offsetjax.models.norms import GroupNorm

_QUERIES = 4096  # of a picture to itself at a time: all scores of one of 1024 px are 1 GiB


@dataclass(frozen=True)
class KLAutoencoder:
    """`init`, `encode` and `decode`; `config` has diffusers' names and values.

    Attributes:
        dtype: that it computes in; norms and softmax are float32.
        class_name: `AutoencoderKL`, or `AutoencoderKLFlux2`, which has `patch_size` and `batch_norm_eps` in its config.
    """

    config: Mapping[str, Any]
    dtype: Any = jnp.float32
    class_name: str = "AutoencoderKL"
    encoder_params: ClassVar = ("encoder", "quant_conv", "bn")

    @property
    def downscale(self) -> int:
        """Pixels a latent pixel of `encode`, on a side."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    @property
    def is_packed(self) -> bool:
        """Whether a denoiser's latents are packed and normalised by stored statistics."""
        return "batch_norm_eps" in self.config

    def _module(self) -> "_KL":
        config = self.config
        channels = config["latent_channels"]
        return _KL(
            channels=tuple(config["block_out_channels"]),
            decoder_channels=tuple(config.get("decoder_block_out_channels") or config["block_out_channels"]),
            layers=config["layers_per_block"],
            groups=config["norm_num_groups"],
            latent_channels=channels,
            pixel_channels=config["out_channels"],
            has_quant=config.get("use_quant_conv", True),
            has_post_quant=config.get("use_post_quant_conv", True),
            has_attention=config.get("mid_block_add_attention", True),
            statistics=channels * _area(config["patch_size"]) if self.is_packed else 0,
            dtype=jnp.dtype(self.dtype),
        )

    def init(self, key: Key[Array, ""]) -> PyTree:
        """Random float32 parameters."""
        # The smallest picture that has a latent pixel: the shapes of parameters do not depend on it.
        pixels = jnp.zeros((1, self.downscale, self.downscale, self.config["in_channels"]))
        return self._module().init(key, pixels)["params"]

    def encode(
        self, params: PyTree, pixels: Float[Array, "b 3 H W"]
    ) -> tuple[Float[Array, "b c h w"], Float[Array, "b c h w"]]:
        """The mean and the log-variance of the latents, not yet as a denoiser has them, of pixels in [-1, 1]."""
        inputs = jnp.transpose(pixels, (0, 2, 3, 1)).astype(self.dtype)
        moments: Any = self._module().apply({"params": params}, inputs, method="encode")
        mean, log_variance = jnp.split(jnp.transpose(moments, (0, 3, 1, 2)).astype(jnp.float32), 2, axis=1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def decode(self, params: PyTree, latents: Float[Array, "b c h w"]) -> Float[Array, "b 3 H W"]:
        """Pixels, about [-1, 1], of latents as `encode` gives them."""
        inputs = jnp.transpose(latents, (0, 2, 3, 1)).astype(self.dtype)
        pixels: Any = self._module().apply({"params": params}, inputs, method="decode")
        return jnp.transpose(pixels, (0, 3, 1, 2)).astype(jnp.float32)

    def normalised(self, params: PyTree, latents: Float[Array, "b c h w"]) -> Float[Array, "b d k l"]:
        """Latents of `encode` as a denoiser has them, in float32."""
        if not self.is_packed:
            return (latents - (self.config.get("shift_factor") or 0.0)) * self.config["scaling_factor"]
        mean, deviation = self._statistics(params)
        return (packed(latents, self.config["patch_size"]) - mean) / deviation

    def denormalised(self, params: PyTree, latents: Float[Array, "b d k l"]) -> Float[Array, "b c h w"]:
        """The inverse of `normalised`: latents for `decode`."""
        if not self.is_packed:
            return latents / self.config["scaling_factor"] + (self.config.get("shift_factor") or 0.0)
        mean, deviation = self._statistics(params)
        return unpacked(latents * deviation + mean, self.config["patch_size"])

    def _statistics(self, params: PyTree) -> tuple[Float[Array, "d 1 1"], Float[Array, "d 1 1"]]:
        mean, variance = (
            jnp.asarray(jax.lax.stop_gradient(params["bn"][name]), jnp.float32)[:, None, None]
            for name in ("running_mean", "running_var")
        )
        return mean, jnp.sqrt(variance + self.config["batch_norm_eps"])

    def torch_config(self) -> dict[str, Any]:
        """The `config.json` that PyTorch diffusers reads."""
        return {"_class_name": self.class_name, "act_fn": "silu", "force_upcast": True, **self.config}


def packed(latents: Float[Array, "b c h w"], size: Sequence[int]) -> Float[Array, "b d k l"]:
    """Places of `size` as channels of one place; a channel's places side by side.

    Raises:
        ValueError: the sides are no multiples of the size.
    """
    batch, channels, height, width = latents.shape
    rows, columns = size
    if height % rows or width % columns:
        raise ValueError(f"latents of {height} x {width} do not divide into places of {rows} x {columns}")
    split = latents.reshape(batch, channels, height // rows, rows, width // columns, columns)
    return split.transpose(0, 1, 3, 5, 2, 4).reshape(batch, -1, height // rows, width // columns)


def unpacked(latents: Float[Array, "b d k l"], size: Sequence[int]) -> Float[Array, "b c h w"]:
    """The inverse of `packed`."""
    batch, _, height, width = latents.shape
    rows, columns = size
    split = latents.reshape(batch, -1, rows, columns, height, width)
    return split.transpose(0, 1, 4, 2, 5, 3).reshape(batch, -1, height * rows, width * columns)


def _area(size: Sequence[int]) -> int:
    rows, columns = size
    return rows * columns


class _KL(nn.Module):
    channels: tuple[int, ...]
    decoder_channels: tuple[int, ...]
    layers: int
    groups: int
    latent_channels: int
    pixel_channels: int
    has_quant: bool
    has_post_quant: bool
    has_attention: bool
    statistics: int  # channels of those stored; 0: none
    dtype: Any

    def setup(self) -> None:
        both = {"layers": self.layers, "groups": self.groups, "has_attention": self.has_attention, "dtype": self.dtype}
        self.encoder = _Encoder(self.channels, 2 * self.latent_channels, **both)
        self.decoder = _Decoder(self.decoder_channels, self.pixel_channels, **both)
        if self.has_quant:
            self.quant_conv = nn.Conv(2 * self.latent_channels, (1, 1), dtype=self.dtype)
        if self.has_post_quant:
            self.post_quant_conv = nn.Conv(self.latent_channels, (1, 1), dtype=self.dtype)
        if self.statistics:
            self.bn = _Statistics(self.statistics)

    def __call__(self, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b H W 3"]:
        if self.statistics:
            self.bn()
        return self.decode(self.encode(pixels)[..., : self.latent_channels])

    def encode(self, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b h w 2*c"]:
        moments = self.encoder(pixels)
        return self.quant_conv(moments) if self.has_quant else moments

    def decode(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        return self.decoder(self.post_quant_conv(latents) if self.has_post_quant else latents)


class _Statistics(nn.Module):
    """A batch norm's buffers by PyTorch's names; counted are the batches that they were taken over."""

    channels: int

    @nn.compact
    def __call__(self) -> None:
        self.param("running_mean", nn.initializers.zeros, (self.channels,), jnp.float32)
        self.param("running_var", nn.initializers.ones, (self.channels,), jnp.float32)
        self.param("num_batches_tracked", nn.initializers.zeros, (), jnp.float32)


class _Encoder(nn.Module):
    channels: tuple[int, ...]
    features: int
    layers: int
    groups: int
    has_attention: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b H W 3"]) -> Float[Array, "b h w e"]:
        x = _convolution(self.channels[0], self.dtype, "conv_in")(x)
        for place, width in enumerate(self.channels):
            change = _Downsample if place < len(self.channels) - 1 else None
            x = _Stage(width, self.layers, self.groups, self.dtype, change, name=f"down_blocks_{place}")(x)
        x = _Middle(self.groups, self.has_attention, self.dtype, name="mid_block")(x)
        x = nn.silu(GroupNorm(self.groups, name="conv_norm_out")(x))
        return _convolution(self.features, self.dtype, "conv_out")(x)


class _Decoder(nn.Module):
    channels: tuple[int, ...]  # in the encoder's order
    features: int
    layers: int
    groups: int
    has_attention: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        x = _convolution(self.channels[-1], self.dtype, "conv_in")(x)
        x = _Middle(self.groups, self.has_attention, self.dtype, name="mid_block")(x)
        for place, width in enumerate(reversed(self.channels)):
            change = _Upsample if place < len(self.channels) - 1 else None
            x = _Stage(width, self.layers + 1, self.groups, self.dtype, change, name=f"up_blocks_{place}")(x)
        x = nn.silu(GroupNorm(self.groups, name="conv_norm_out")(x))
        return _convolution(self.features, self.dtype, "conv_out")(x)


class _Stage(nn.Module):
    """Residual blocks, and what changes the resolution after them."""

    features: int
    layers: int
    groups: int
    dtype: Any
    change: "type[_Downsample] | type[_Upsample] | None"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b k l d"]:
        for place in range(self.layers):
            x = _Residual(self.features, self.groups, self.dtype, name=f"resnets_{place}")(x)
        return x if self.change is None else self.change(self.dtype, name=self.change.list_name)(x)


class _Middle(nn.Module):
    groups: int
    has_attention: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        x = _Residual(x.shape[-1], self.groups, self.dtype, name="resnets_0")(x)
        if self.has_attention:
            x = _Attention(self.groups, self.dtype, name="attentions_0")(x)
        return _Residual(x.shape[-1], self.groups, self.dtype, name="resnets_1")(x)


class _Residual(nn.Module):
    features: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        hidden = nn.silu(GroupNorm(self.groups, name="norm1")(x))
        hidden = _convolution(self.features, self.dtype, "conv1")(hidden)
        hidden = nn.silu(GroupNorm(self.groups, name="norm2")(hidden))
        hidden = _convolution(self.features, self.dtype, "conv2")(hidden)
        if x.shape[-1] != self.features:
            x = nn.Conv(self.features, (1, 1), dtype=self.dtype, name="conv_shortcut")(x)
        return x + hidden


class _Attention(nn.Module):
    """Of all places of a picture to each other, in one head."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        channels = x.shape[-1]
        places = GroupNorm(self.groups, name="group_norm")(x).reshape(len(x), -1, channels)
        query, key, value = (
            nn.Dense(channels, dtype=self.dtype, name=name)(places) for name in ("to_q", "to_k", "to_v")
        )
        attended = [
            attend(query[:, start : start + _QUERIES], key, value, 1) for start in range(0, query.shape[1], _QUERIES)
        ]
        out = nn.Dense(channels, dtype=self.dtype, name="to_out_0")(jnp.concatenate(attended, axis=1))
        return x + out.reshape(x.shape)


class _Downsample(nn.Module):
    dtype: Any
    list_name = "downsamplers_0"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b k l c"]:
        below_and_right = ((0, 1), (0, 1))
        return nn.Conv(x.shape[-1], (3, 3), (2, 2), below_and_right, dtype=self.dtype, name="conv")(x)


class _Upsample(nn.Module):
    dtype: Any
    list_name = "upsamplers_0"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
        return _convolution(x.shape[-1], self.dtype, "conv")(x.repeat(2, axis=1).repeat(2, axis=2))


def _convolution(features: int, dtype: Any, name: str) -> nn.Conv:
    return nn.Conv(features, (3, 3), padding=1, dtype=dtype, name=name)
