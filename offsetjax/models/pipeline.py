"""All parts of a latent diffusion model, built from a config, without weights; and which of them a run trains.

Parts go by the names of diffusers' folders: `unet`, `vae`, `text_encoder` and, in SDXL, `text_encoder_2`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PyTree
from ml_collections import ConfigDict
from transformers import CLIPTokenizer

from offsetjax.diffusion.noise import Noise, make_noise
from offsetjax.diffusion.process import make_process
from offsetjax.errors import UserError
from offsetjax.models import attention, lora
from offsetjax.models.autoencoder import Autoencoder
from offsetjax.models.lora import Adapted
from offsetjax.models.text import TextEncoder
from offsetjax.models.tokenizer import tokenize
from offsetjax.models.unet import UNet

_SHARDS_TO_SCAN = 8  # a loop needs the weights of its layers stacked, which for whole ones would be a second copy
FAMILIES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "Stable Diffusion XL"}


@dataclass(frozen=True)
class Pipeline:
    """The parts, without weights. An autoencoder's training uses `vae` alone, and has no tokenizers."""

    vae: Autoencoder
    unet: UNet | Adapted
    text_encoder: TextEncoder | Adapted
    text_encoder_2: TextEncoder | Adapted | None = None  # SDXL's
    tokenizers: tuple[CLIPTokenizer, ...] = ()  # one for each text encoder
    force_zeros_for_empty_prompt: bool = False

    @property
    def text_encoders(self) -> dict[str, TextEncoder | Adapted]:
        """The text encoders by their parts' names, in the order of the tokenizers."""
        both = {"text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}
        return {part: model for part, model in both.items() if model is not None}

    @property
    def dtypes(self) -> dict[str, jnp.dtype]:
        """The type that each part computes in."""
        return {part: model.dtype for part, model in {"vae": self.vae, "unet": self.unet, **self.text_encoders}.items()}

    @property
    def is_conditioned_on_size(self) -> bool:
        """Whether the denoiser takes SDXL's pooled text and micro-conditioning (arXiv 2307.01952)."""
        return self.unet.has_added_conditions

    def tokenize(self, captions: Sequence[str]) -> Int[np.ndarray, "b e n"]:
        """Token ids of captions for each of the e text encoders, padded and cut to their length."""
        return np.stack([tokenize(self.tokenizers, caption).input_ids for caption in captions])


def family(config: ConfigDict) -> str:
    """`sd1`, `sd2` or `sdxl`: what the config names, or what its architecture is."""
    if config.model.family:
        return config.model.family
    if config.model.unet.addition_embed_type == "text_time":
        return "sdxl"
    return "sd2" if config.model.unet.use_linear_projection else "sd1"


def text_parts(config: ConfigDict) -> tuple[str, ...]:
    """The text encoders of the config's family."""
    return ("text_encoder", "text_encoder_2") if family(config) == "sdxl" else ("text_encoder",)


def network_parts(config: ConfigDict) -> tuple[str, ...]:
    """The parts with weights that `config.task` needs."""
    return ("vae",) if config.task == "autoencoder" else ("unet", "vae", *text_parts(config))


def trained_parts(config: ConfigDict) -> tuple[str, ...]:
    """The parts that a run trains, whole or by their adapters."""
    if config.task == "autoencoder":
        return ("vae",)
    return ("unet", *(text_parts(config) if config.optimizer.text_encoder_learning_rate else ()))


def frozen_parts(config: ConfigDict) -> tuple[str, ...]:
    """The parts whose weights do not change: with adapters, all of them."""
    trained = () if config.lora.rank else trained_parts(config)
    return tuple(part for part in network_parts(config) if part not in trained)


def step_parts(config: ConfigDict) -> tuple[str, ...]:
    """The frozen parts that a train step computes with: no autoencoder where the latents are cached."""
    return tuple(part for part in frozen_parts(config) if part != "vae" or not config.data.cached_latents)


def build(config: ConfigDict, tokenizers: Sequence[CLIPTokenizer] = ()) -> Pipeline:
    """The parts of `config.model`, with `config.lora.rank` those that are trained with adapters."""
    model, dtype = config.model, jnp.dtype(config.model.dtype)
    is_sdxl = family(config) == "sdxl"
    parts: dict[str, Any] = {
        "unet": UNet(model.unet.to_dict(), dtype),
        "text_encoder": TextEncoder(model.text_encoder.to_dict(), dtype, is_penultimate=is_sdxl),
    }
    if is_sdxl:
        second = model.text_encoder_2.to_dict()
        parts["text_encoder_2"] = TextEncoder(second, dtype, is_penultimate=True, has_projection=True)
    if config.lora.rank:
        scale = adapter_scale(config)
        parts |= {part: Adapted(parts[part], scale) for part in trained_parts(config)}
    return Pipeline(
        vae=Autoencoder(model.vae.to_dict()),
        tokenizers=tuple(tokenizers),
        force_zeros_for_empty_prompt=model.force_zeros_for_empty_prompt,
        **parts,
    )


def for_training(pipeline: Pipeline, config: ConfigDict, platform: str, num_shards: int = 1) -> Pipeline:
    """The pipeline as it is trained, to be traced by each device for itself.

    The denoiser has `model.attention`, `model.remat` and, as the text encoders have, `model.scan_layers`. Pictures are
    encoded in the compute type, as by other trainers (latents move by 1 % of their deviation, their means by less); not
    SDXL's, whose autoencoder is for float32 alone, nor by an autoencoder that is itself trained.

    Args:
        shares: that FSDP splits a weight into.

    Raises:
        UserError: the platform ("tpu", "gpu" or "cpu") or the pictures' size has no use for the kernel that is named.
    """
    setting = config.model.attention
    try:
        kernel = attention.kernel_of(setting, platform, pipeline.unet.dtype)
    except ValueError as error:
        raise UserError(f"config: model.attention = {setting}: {error}; auto takes what fits") from None
    longest = (config.data.resolution // pipeline.vae.downscale) ** 2
    lengths = [longest // 4**halvings for halvings in range(len(config.model.unet.block_out_channels))]
    if setting in ("splash", "cudnn") and not any(attention.takes_kernel(setting, n, n, channels=1) for n in lengths):
        raise UserError(
            f"config: model.attention = {setting} takes {attention.SHORTEST} positions and more, and "
            f"data.resolution = {config.data.resolution} gives the blocks {', '.join(map(str, lengths))}; "
            "auto takes what fits"
        )

    scan = config.model.scan_layers
    is_scanned = scan == "always" or (scan == "auto" and num_shards >= _SHARDS_TO_SCAN)

    def settle(model: Any, **settings: Any) -> Any:
        if isinstance(model, Adapted):
            return replace(model, model=settle(model.model, **settings))
        return replace(model, is_scanned=is_scanned, **settings)

    is_half_enough = config.task == "diffusion" and family(config) != "sdxl"
    vae = replace(pipeline.vae, dtype=pipeline.unet.dtype) if is_half_enough else pipeline.vae
    trained = lora.ARRAYS if isinstance(pipeline.unet, Adapted) else None
    unet = settle(pipeline.unet, kernel=kernel, remat=config.model.remat, trained=trained)
    texts = {part: settle(model) for part, model in pipeline.text_encoders.items()}
    return replace(pipeline, unet=unet, vae=vae, **texts)


def training_noise(pipeline: Pipeline, config: ConfigDict) -> Noise:
    """The noise that a config trains with."""
    return make_noise(config.noise, make_process(config.schedule), pipeline.vae.downscale)


def adapter_scale(config: ConfigDict) -> float:
    """What the adapters' output is multiplied by: alpha / rank."""
    return (config.lora.alpha or config.lora.rank) / config.lora.rank


def join(trained: Mapping[str, PyTree], frozen: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """What each part's `apply` takes: its weights, or for a part in both, frozen base and trained adapters."""
    both = {part: {"base": frozen[part], "adapters": adapters} for part, adapters in trained.items() if part in frozen}
    return {**frozen, **trained, **both}
