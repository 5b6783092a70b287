"""The denoiser: diffusers' `FlaxUNet2DConditionModel`, with PyTorch's numerics."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from diffusers import FlaxUNet2DConditionModel
from jaxtyping import Array, Float, Int, Key, PyTree

from offsetjax.models.intercept import torch_numerics

# What the config does not vary, and PyTorch needs to be told.
_FIXED = {"act_fn": "silu", "norm_eps": 1e-5, "mid_block_type": "UNetMidBlock2DCrossAttn"}


@dataclass(frozen=True)
class UNet:
    """`init` and `apply` of the denoiser; `config` has diffusers' names and values."""

    config: Mapping[str, Any]
    dtype: jnp.dtype
    class_name: str = "UNet2DConditionModel"

    def _module(self) -> FlaxUNet2DConditionModel:
        fields = {key: value for key, value in self.config.items() if key != "norm_num_groups"}
        return FlaxUNet2DConditionModel(**fields, dtype=self.dtype)

    def init(self, key: Key[Array, ""]) -> PyTree:
        """Random float32 parameters."""
        size = self.config["sample_size"]
        latents = jnp.zeros((1, self.config["in_channels"], size, size))
        hidden = jnp.zeros((1, 1, self.config["cross_attention_dim"]))
        with torch_numerics(self.config["norm_num_groups"]):
            return self._module().init(key, latents, jnp.zeros(1, jnp.int32), hidden)["params"]

    def apply(
        self,
        params: PyTree,
        latents: Float[Array, "b c h w"],
        timesteps: Int[Array, " b"],
        encoder_hidden_states: Float[Array, "b n d"],
    ) -> Float[Array, "b c h w"]:
        """The prediction (ε or v), computed in `dtype` and returned in float32."""
        with torch_numerics(self.config["norm_num_groups"]):
            output = self._module().apply(
                {"params": params},
                jnp.asarray(latents, self.dtype),
                jnp.asarray(timesteps),  # diffusers takes anything but a jax array for one number
                jnp.asarray(encoder_hidden_states, self.dtype),
            )
        return output.sample.astype(jnp.float32)

    def torch_config(self) -> dict[str, Any]:
        """The `config.json` that PyTorch diffusers reads."""
        return {"_class_name": self.class_name, **self.config, **_FIXED}
