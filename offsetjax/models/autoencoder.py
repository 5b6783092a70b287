"""Stable Diffusion's autoencoder: diffusers' `FlaxAutoencoderKL`, corrected until it has PyTorch's numerics.

What is corrected of diffusers' Flax modules:

- group normalisation has the configured number of groups, and `intercept.group_norm`'s numerics;
- softmax is taken in float32, of scores in float32 (theirs: in the compute type), of some queries at a time;
- upsampling repeats pixels (theirs gathers them and scatters their gradients: the same numbers, slowly);
- attention can be left out (`mid_block_add_attention=False`, as in PyTorch).
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from diffusers import FlaxAutoencoderKL
from diffusers.models.vae_flax import FlaxAttentionBlock, FlaxUpsample2D
from jaxtyping import Array, Float, Key, PyTree

from offsetjax.models.attention import attend
from offsetjax.models.intercept import corrected, group_norm

_QUERIES = 4096  # that attend at a time


@dataclass(frozen=True)
class Autoencoder:
    """`init`, `encode` and `decode`; `config` has diffusers' names and values.

    Attributes:
        dtype: that it computes in. Pictures are drawn in float32; SDXL's overflows in float16.
    """

    config: Mapping[str, Any]
    dtype: Any = jnp.float32
    class_name: str = "AutoencoderKL"
    encoder_params: ClassVar = ("encoder", "quant_conv")

    @property
    def downscale(self) -> int:
        """Pixels a latent pixel, on a side."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    @property
    def latent_channels(self) -> int:
        return self.config["latent_channels"]

    @property
    def scaling_factor(self) -> float:
        """What latents are multiplied by for the denoiser; 0 where that is to be found out from the data."""
        return self.config["scaling_factor"]

    def _module(self) -> FlaxAutoencoderKL:
        fields = {key: value for key, value in self.config.items() if key != "mid_block_add_attention"}
        return FlaxAutoencoderKL(**fields, dtype=jnp.dtype(self.dtype))

    def _numerics(self) -> AbstractContextManager[None]:
        return numerics(self.config["norm_num_groups"], self.config["mid_block_add_attention"])

    def init(self, key: Key[Array, ""]) -> PyTree:
        """Random float32 parameters."""
        # The smallest picture that has a latent pixel to normalise: the shapes of parameters do not depend on it.
        pixels = jnp.zeros((1, self.config["in_channels"], 8 * self.downscale, 8 * self.downscale))
        with self._numerics():
            return self._module().init(key, pixels)["params"]

    def encode(
        self, params: PyTree, pixels: Float[Array, "b 3 H W"]
    ) -> tuple[Float[Array, "b c h w"], Float[Array, "b c h w"]]:
        """The mean and the log-variance of the latents (not yet scaled) of pixels in [-1, 1]."""
        with self._numerics():
            posterior = self._module().apply({"params": params}, pixels.astype(self.dtype), method="encode").latent_dist
        mean, log_variance = (jnp.transpose(x, (0, 3, 1, 2)) for x in (posterior.mean, posterior.logvar))
        return mean.astype(jnp.float32), log_variance.astype(jnp.float32)

    def decode(self, params: PyTree, latents: Float[Array, "b c h w"]) -> Float[Array, "b 3 H W"]:
        """Pixels, about [-1, 1], of latents that are not scaled."""
        # Channels last: diffusers' own transposition guesses the layout from the shape.
        channels_last = jnp.transpose(latents, (0, 2, 3, 1)).astype(self.dtype)
        with self._numerics():
            return self._module().apply({"params": params}, channels_last, method="decode").sample.astype(jnp.float32)

    @staticmethod
    def standardised(params: PyTree, mean: Float[np.ndarray, " c"], std: Float[np.ndarray, " c"]) -> PyTree:
        """The same autoencoder with other latents, `(z - mean) / std` a channel, folded into its two 1x1 convolutions.

        Args:
            mean, std: of the latents over the data, a channel; with them the new latents have mean 0 and deviation 1.
        """
        quant, post_quant = params["quant_conv"], params["post_quant_conv"]
        scale = np.concatenate([1.0 / std, np.ones_like(std)]).astype(np.float32)
        # The variance is divided by std². A logarithm in float32 is not the same on every machine.
        shift = np.concatenate([-mean / std, -2.0 * np.log(std.astype(np.float64))]).astype(np.float32)
        kernel = post_quant["kernel"]
        return {
            **params,
            "quant_conv": {"kernel": quant["kernel"] * scale, "bias": quant["bias"] * scale + shift},
            "post_quant_conv": {"kernel": kernel * std[:, None], "bias": post_quant["bias"] + mean @ kernel[0, 0]},
        }

    def torch_config(self) -> dict[str, Any]:
        """The `config.json` that PyTorch diffusers reads."""
        return {"_class_name": self.class_name, **self.config, "act_fn": "silu", "force_upcast": True}


def numerics(norm_num_groups: int, attends: bool = True) -> AbstractContextManager[None]:
    """A context in which diffusers' Flax modules of the autoencoder are traced with PyTorch's numerics.

    Args:
        norm_num_groups: groups of every group normalisation.
        attends: whether the middle block attends.
    """
    return corrected(
        {
            nn.GroupNorm: partial(group_norm, groups=norm_num_groups),
            FlaxUpsample2D: _upsample,
            FlaxAttentionBlock: _attention if attends else lambda module, x: x,
        }
    )


def _attention(module: FlaxAttentionBlock, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    positions = module.group_norm(x).reshape(len(x), -1, x.shape[-1])
    query, key, value = module.query(positions), module.key(positions), module.value(positions)
    # A part of the queries at a time: all scores of a picture of 1024 px are 1 GiB.
    parts = -(-query.shape[1] // _QUERIES) if query.shape[1] % _QUERIES == 0 else 1
    queries = query.reshape(len(x), parts, -1, query.shape[-1])
    attended = [attend(queries[:, part], key, value, module.num_heads) for part in range(parts)]
    return x + module.proj_attn(jnp.concatenate(attended, axis=1)).reshape(x.shape)


def _upsample(module: FlaxUpsample2D, x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w e"]:
    return module.conv(x.repeat(2, axis=1).repeat(2, axis=2))
