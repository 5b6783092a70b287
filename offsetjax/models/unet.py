"""Stable Diffusion's denoiser: diffusers' `FlaxUNet2DConditionModel`, corrected until it has PyTorch's numerics.

Stable Diffusion 1.x and 2.x are conditioned on the timestep and the text; XL (`addition_embed_type = "text_time"`) also
on the caption as a whole, `text_embeds`, and on the sizes of the picture, `time_ids`:

    embedding = time_embedding(sinusoids(timestep)) + add_embedding([text_embeds, sinusoids(time_ids)])

What is corrected of diffusers' Flax modules:

- GEGLU takes the exact GELU (theirs: the tanh approximation);
- the group normalisation of a transformer has ε = 1e-6 (theirs: 1e-5), and all have the configured number of groups
  (theirs: always 32) and `intercept.group_norm`'s numerics;
- softmax is taken in float32, of scores in float32 (theirs: in the compute type);
- upsampling repeats pixels (theirs gathers them and scatters their gradients: the same numbers, slowly).
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from diffusers import FlaxUNet2DConditionModel
from diffusers.models.attention_flax import (
    FlaxAttention,
    FlaxBasicTransformerBlock,
    FlaxGEGLU,
    FlaxTransformer2DModel,
)
from diffusers.models.resnet_flax import FlaxDownsample2D, FlaxResnetBlock2D, FlaxUpsample2D
from diffusers.models.unets.unet_2d_blocks_flax import (
    FlaxCrossAttnDownBlock2D,
    FlaxCrossAttnUpBlock2D,
    FlaxDownBlock2D,
    FlaxUNetMidBlock2DCrossAttn,
    FlaxUpBlock2D,
)
from jaxtyping import Array, Float, Key, Num, PyTree

from offsetjax.errors import UserError
from offsetjax.models.attention import attend
from offsetjax.models.blocks import Blocks
from offsetjax.models.intercept import corrected, group_norm
from offsetjax.models.tracing import PLAIN, Tracing, traced
from offsetjax.parallel.sharding import split_layers

# What the config does not vary, and PyTorch needs to know.
_FIXED = {"act_fn": "silu", "norm_eps": 1e-5, "mid_block_type": "UNetMidBlock2DCrossAttn"}
_NONE_IF_EMPTY = ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")
_ONE_PER_BLOCK = ("attention_head_dim", "transformer_layers_per_block")
_NUM_TIME_IDS = 6  # original height and width, crop top and left, target height and width


@dataclass(frozen=True)
class UNet:
    """`init` and `apply` of the denoiser; `config` has diffusers' names, and "" or 0 where diffusers has None.

    Attributes:
        tracing: how `apply` is traced in training.
    """

    config: Mapping[str, Any]
    dtype: jnp.dtype
    tracing: Tracing = PLAIN
    class_name: str = "UNet2DConditionModel"
    sharding: ClassVar = split_layers("to_q|to_k|to_v|net_0/proj", "to_out_0|net_2")

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
        with numerics(self.config["norm_num_groups"]):
            return self._module().init(key, latents, jnp.zeros(1, jnp.int32), hidden, added_conditions)["params"]

    def apply(
        self,
        params: PyTree,
        latents: Float[Array | np.ndarray, "b c h w"],
        timesteps: Num[Array | np.ndarray, " b"],
        encoder_hidden_states: Float[Array | np.ndarray, "b n d"],
        added_conditions: Mapping[str, Float[Array | np.ndarray, "b _"]] | None = None,
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
        with traced(BLOCKS, self.tracing), numerics(self.config["norm_num_groups"], self.tracing.kernel):
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


def _repeated(module: nn.Module) -> Sequence[nn.Module]:
    is_one = isinstance(module, FlaxBasicTransformerBlock) and isinstance(module.parent, FlaxTransformer2DModel)
    return module.parent.transformer_blocks if is_one else ()  # type: ignore[union-attr]


BLOCKS = Blocks(
    attention=(FlaxAttention,),
    blocks=(FlaxBasicTransformerBlock, FlaxResnetBlock2D, FlaxUpsample2D, FlaxDownsample2D),
    stages=(
        FlaxCrossAttnDownBlock2D,
        FlaxCrossAttnUpBlock2D,
        FlaxDownBlock2D,
        FlaxUNetMidBlock2DCrossAttn,
        FlaxUpBlock2D,
    ),
    repeated=_repeated,
)


def numerics(norm_num_groups: int, kernel: str = "xla") -> AbstractContextManager[None]:
    """A context in which diffusers' Flax modules of the UNet are traced with PyTorch's numerics.

    Args:
        norm_num_groups: groups of every group normalisation.
        kernel: of attention: xla, splash or cudnn.
    """
    return corrected(
        {
            nn.GroupNorm: partial(_group_norm, groups=norm_num_groups),
            FlaxGEGLU: _geglu,
            FlaxAttention: partial(_attention, kernel=kernel),
            FlaxUpsample2D: _upsample,
        }
    )


def _group_norm(module: nn.GroupNorm, x: Float[Array, "b h w c"], groups: int) -> Float[Array, "b h w c"]:
    return group_norm(module, x, groups, 1e-6 if isinstance(module.parent, FlaxTransformer2DModel) else None)


def _geglu(module: FlaxGEGLU, x: Float[Array, "b n d"], deterministic: bool = True) -> Float[Array, "b n e"]:
    linear, gate = jnp.split(module.proj(x), 2, axis=-1)
    return linear * nn.gelu(gate, approximate=False)


def _attention(
    module: FlaxAttention,
    x: Float[Array, "b n d"],
    context: Float[Array, "b m e"] | None = None,
    deterministic: bool = True,
    *,
    kernel: str,
) -> Float[Array, "b n d"]:
    context = x if context is None else context
    projected = module.query(x), module.key(context), module.value(context)
    return module.proj_attn(attend(*projected, module.heads, kernel=kernel))


def _upsample(module: FlaxUpsample2D, x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w e"]:
    return module.conv(x.repeat(2, axis=1).repeat(2, axis=2))
