"""The denoiser: diffusers' `FlaxUNet2DConditionModel`, with PyTorch's numerics.

Stable Diffusion 1.x and 2.x are told the timestep and the text; XL (`addition_embed_type = "text_time"`) also the
caption as a whole, `text_embeds`, and the sizes of the picture, `time_ids`:

    embedding = time_embedding(sinusoids(timestep)) + add_embedding([text_embeds, sinusoids(time_ids)])
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from diffusers import FlaxUNet2DConditionModel
from jaxtyping import Array, Float, Int, Key, PyTree

from offsetjax.errors import UserError
from offsetjax.models.intercept import torch_numerics
from offsetjax.models.remat import rematerialised
from offsetjax.models.scan import scanned

# What the config does not vary, and PyTorch needs to be told.
_FIXED = {"act_fn": "silu", "norm_eps": 1e-5, "mid_block_type": "UNetMidBlock2DCrossAttn"}
_NONE_IF_EMPTY = ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")
_ONE_PER_BLOCK = ("attention_head_dim", "transformer_layers_per_block")
_NUM_TIME_IDS = 6  # original height and width, crop top and left, target height and width


@dataclass(frozen=True)
class UNet:
    """`init` and `apply` of the denoiser; `config` has diffusers' names, and "" or 0 where diffusers has None.

    Attributes:
        kernel: of attention (`attention.py`); one other than "xla" needs each device to trace `apply` for itself.
        remat: what the backward pass computes again (`remat.py`).
        is_scanned: whether blocks that repeat are one loop (`scan.py`).
        trained: the names of the arrays that are, where not all are (`lora.py`).
    """

    config: Mapping[str, Any]
    dtype: jnp.dtype
    kernel: str = "xla"
    remat: str = "none"
    is_scanned: bool = False
    trained: tuple[str, ...] | None = None
    class_name: str = "UNet2DConditionModel"

    @property
    def has_added_conditions(self) -> bool:
        """Whether `apply` needs `added_conditions`."""
        return self.config.get("addition_embed_type") == "text_time"

    def attention_lengths(self, latent_pixels: int) -> tuple[int, ...]:
        """The positions that attend to each other in the blocks, for latents of so many pixels."""
        return tuple(latent_pixels // 4**halvings for halvings in range(len(self.config["block_out_channels"])))

    def _fields(self) -> dict[str, Any]:
        """The config as diffusers, Flax and PyTorch, takes it."""
        fields = dict(self.config)
        fields |= {key: fields[key] or None for key in _NONE_IF_EMPTY if key in fields}
        blocks = len(fields["block_out_channels"])
        for key in set(_ONE_PER_BLOCK) & set(fields):
            fields[key] = _one_per_block(f"model.unet.{key}", fields[key], blocks)
        return fields

    def _module(self) -> FlaxUNet2DConditionModel:
        fields = {key: value for key, value in self._fields().items() if key != "norm_num_groups"}
        return FlaxUNet2DConditionModel(**fields, dtype=self.dtype)

    def init(self, key: Key[Array, ""]) -> PyTree:
        """Random float32 parameters."""
        # The smallest latents that all blocks can halve: the shapes of parameters do not depend on it.
        size = 2 ** (len(self.config["block_out_channels"]) - 1)
        latents = jnp.zeros((1, self.config["in_channels"], size, size))
        hidden = jnp.zeros((1, 1, self.config["cross_attention_dim"]))
        added_conditions = None
        if self.has_added_conditions:
            sinusoids = _NUM_TIME_IDS * self.config["addition_time_embed_dim"]
            text_embeds = jnp.zeros((1, self.config["projection_class_embeddings_input_dim"] - sinusoids))
            added_conditions = {"text_embeds": text_embeds, "time_ids": jnp.zeros((1, _NUM_TIME_IDS))}
        with torch_numerics(self.config["norm_num_groups"]):
            return self._module().init(key, latents, jnp.zeros(1, jnp.int32), hidden, added_conditions)["params"]

    def apply(
        self,
        params: PyTree,
        latents: Float[Array, "b c h w"],
        timesteps: Int[Array, " b"],
        encoder_hidden_states: Float[Array, "b n d"],
        added_conditions: Mapping[str, Float[Array, "b _"]] | None = None,
    ) -> Float[Array, "b c h w"]:
        """The prediction (ε or v), computed in `dtype` and returned in float32.

        Args:
            added_conditions: `text_embeds` [b, p] and `time_ids` [b, 6], in pixels; read by a `text_time` UNet alone.

        Raises:
            ValueError: a `text_time` UNet without them.
        """
        conditions = None
        if self.has_added_conditions:
            if added_conditions is None or not {"text_embeds", "time_ids"} <= set(added_conditions):
                raise ValueError("UNet.apply: addition_embed_type = text_time needs text_embeds and time_ids")
            conditions = {
                "text_embeds": jnp.asarray(added_conditions["text_embeds"], self.dtype),
                "time_ids": jnp.asarray(added_conditions["time_ids"], jnp.float32),  # bfloat16 has no 1023 pixels
            }
        numerics = torch_numerics(self.config["norm_num_groups"], kernel=self.kernel)
        loops = scanned(self.remat) if self.is_scanned else nullcontext()
        with loops, rematerialised(self.remat, self.trained), numerics:
            output = self._module().apply(
                {"params": params},
                jnp.asarray(latents, self.dtype),
                jnp.asarray(timesteps),  # diffusers takes anything but a jax array for one number
                jnp.asarray(encoder_hidden_states, self.dtype),
                conditions,
            )
        return output.sample.astype(jnp.float32)

    def torch_config(self) -> dict[str, Any]:
        """The `config.json` that PyTorch diffusers reads."""
        return {"_class_name": self.class_name, **self._fields(), **_FIXED}


def _one_per_block(field: str, values: tuple[int, ...] | int, blocks: int) -> tuple[int, ...] | int:
    """A number for each block, or the one number that they all have."""
    if isinstance(values, int):
        return values
    if len(set(values)) == 1:
        return values[0]
    if len(values) != blocks:
        raise UserError(f"config: {field} has {len(values)} values for {blocks} blocks; give one a block")
    return tuple(values)
