"""All parts of a latent diffusion model, built from a config, without weights; and which of them a run trains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree
from ml_collections import ConfigDict

from offsetjax.diffusion.noise import Noise, make_noise, weight_at
from offsetjax.diffusion.process import make_process
from offsetjax.errors import UserError
from offsetjax.models import attention, lora
from offsetjax.models.family import Conditions, Family, Tokens, family_of
from offsetjax.models.lora import Adapted
from offsetjax.models.task import task_of
from offsetjax.models.tracing import Tracing
from offsetjax.parallel.sharding import Rule

_SHARDS_TO_SCAN = 8  # a loop needs the weights of its layers stacked, which for whole ones would be a second copy


@dataclass(frozen=True)
class Pipeline:
    """The parts of a family's model, without weights.

    Attributes:
        parts: the networks by name.
        settings: what the config's `model` says beside the parts' architectures.
        tokenizers: by text encoder; an autoencoder's training has none.
    """

    family: Family
    parts: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    tokenizers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def denoiser(self) -> Any:
        return self.parts[self.family.denoiser]

    @property
    def autoencoder(self) -> Any:
        return self.parts[self.family.autoencoder]

    def denoise(
        self,
        params: Mapping[str, PyTree],
        noisy: Float[Array, "b c h w"],
        timesteps: Float[Array, " b"] | Int[Array, " b"],
        conditions: Conditions,
    ) -> Float[Array, "b c h w"]:
        """The denoiser's prediction; `params` are those of all parts."""
        return self.denoiser.apply(params[self.family.denoiser], noisy, timesteps, **conditions)

    @property
    def dtypes(self) -> dict[str, Any]:
        """The type that each part computes in."""
        return {part: model.dtype for part, model in self.parts.items()}

    @property
    def sharding(self) -> tuple[Rule, ...]:
        """The rules that the networks declare, by which their weights are split over `tensor`."""
        return tuple(dict.fromkeys(rule for model in self.parts.values() for rule in getattr(model, "sharding", ())))

    def tokenize(self, captions: Sequence[str]) -> dict[str, Int[np.ndarray, "b _"]]:
        """Token ids of captions by text encoder, padded and cut to the length of each."""
        rows = [self.tokens(caption).input_ids for caption in captions]
        return {part: np.stack([row[part] for row in rows]) for part in self.tokenizers}

    def tokens(self, caption: str) -> Tokens:
        """One caption's ids by text encoder, and the length of the one that cuts the most of it."""
        tokenize = self.family.tokenizing.tokenize
        read = {part: tokenize(tokenizer, caption) for part, tokenizer in self.tokenizers.items()}
        if not read:  # an autoencoder reads no captions
            return Tokens({}, 0, 0)
        counts = [(num_tokens, len(ids)) for ids, num_tokens in read.values()]
        num_tokens, limit = max(counts, key=lambda count: count[0] - count[1])
        return Tokens({part: ids for part, (ids, _) in read.items()}, num_tokens, limit)


@dataclass(frozen=True)
class Named:
    """A part in all of whose computations its name stands, as plans and profiles show it; else the part itself."""

    name: str
    model: Any

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(self.model, attribute)
        return jax.named_scope(self.name)(value) if attribute in ("apply", "encode", "decode") else value


def network_parts(config: ConfigDict) -> tuple[str, ...]:
    """The parts with weights that a run needs."""
    return task_of(config).parts(family_of(config))


def trained_parts(config: ConfigDict) -> tuple[str, ...]:
    """The parts that a run trains, whole or by their adapters."""
    return task_of(config).trained(family_of(config), config.train.text_encoders)


def frozen_parts(config: ConfigDict) -> tuple[str, ...]:
    """The parts whose weights do not change: with adapters, all of them."""
    trained = () if config.lora.rank else trained_parts(config)
    return tuple(part for part in network_parts(config) if part not in trained)


def step_parts(config: ConfigDict) -> tuple[str, ...]:
    """The frozen parts that a train step computes with: no autoencoder where the latents are cached."""
    unused = family_of(config).autoencoder if config.data.cached_latents else None
    return tuple(part for part in frozen_parts(config) if part != unused)


def is_from_scratch(config: ConfigDict, part: str) -> bool:
    """Whether a part is drawn at random rather than loaded."""
    return not config.model.pretrained or part in config.model.from_scratch


def build(config: ConfigDict, tokenizers: Mapping[str, Any] | None = None) -> Pipeline:
    """The parts of `config.model`, with `config.lora.rank` those that are trained with adapters.

    Args:
        tokenizers: by text encoder.
    """
    family = family_of(config)
    parts = family.build(config.model, jnp.dtype(config.model.dtype))
    if config.lora.rank:
        scale = adapter_scale(config)
        parts |= {part: Adapted(parts[part], scale) for part in trained_parts(config)}
    settings = {name: value for name, value in config.model.items() if not isinstance(value, ConfigDict)}
    return Pipeline(family, parts, settings, dict(tokenizers or {}))


def for_training(pipeline: Pipeline, config: ConfigDict, platform: str, num_shards: int = 1) -> Pipeline:
    """The pipeline as it is trained, to be traced by each device for itself; what it computes carries the parts' names.

    The denoiser has `model.attention`, `model.remat` and, as the text encoders have, `model.scan_layers`. Pictures are
    encoded in the compute type, as by other trainers (latents move by 1 % of their standard deviation, their means by
    less), where the family allows it and the autoencoder is not itself trained.

    Args:
        num_shards: that FSDP splits a weight into.

    Raises:
        UserError: the platform ("tpu", "gpu" or "cpu") or the pictures' size has no use for the kernel that is named.
    """
    setting = config.model.attention
    try:
        kernel = attention.kernel_of(setting, platform, pipeline.denoiser.dtype)
    except ValueError as error:
        raise UserError(f"config: model.attention = {setting}: {error}; auto takes what fits") from None
    longest = (config.data.resolution // pipeline.autoencoder.downscale) ** 2
    lengths = pipeline.denoiser.attention_lengths(longest)
    if setting in ("splash", "cudnn") and not any(attention.takes_kernel(setting, n, n, channels=1) for n in lengths):
        raise UserError(
            f"config: model.attention = {setting} takes {attention.SHORTEST} positions and more, and "
            f"data.resolution = {config.data.resolution} gives the blocks {', '.join(map(str, lengths))}; "
            "auto takes what fits"
        )

    scan = config.model.scan_layers
    is_scanned = scan == "always" or (scan == "auto" and num_shards >= _SHARDS_TO_SCAN)

    family, parts = pipeline.family, dict(pipeline.parts)
    if family.autoencoder not in trained_parts(config) and family.encodes_in_half:
        parts[family.autoencoder] = replace(pipeline.autoencoder, dtype=pipeline.denoiser.dtype)
    trained = lora.ARRAYS if isinstance(pipeline.denoiser, Adapted) else None
    parts[family.denoiser] = _traced(pipeline.denoiser, Tracing(kernel, config.model.remat, is_scanned, trained))
    parts |= {part: _traced(parts[part], Tracing(is_scanned=is_scanned)) for part in family.encoders}
    return replace(pipeline, parts={part: Named(part, model) for part, model in parts.items()})


def _traced(model: Any, tracing: Tracing) -> Any:
    if isinstance(model, Adapted):
        return replace(model, model=_traced(model.model, tracing))
    return replace(model, tracing=tracing)


def training_noise(pipeline: Pipeline, config: ConfigDict, step: Any = None) -> Noise:
    """The noise that a config trains with.

    Args:
        step: after which, a number or a traced one; None: before `noise.anneal` makes any difference.
    """
    downscale = pipeline.autoencoder.downscale
    noise = make_noise(config.noise, make_process(config.schedule, downscale), downscale)
    return noise if step is None else noise.weighted(weight_at(step, config.train.steps, config.noise.anneal))


def adapter_scale(config: ConfigDict) -> float:
    """What the adapters' output is multiplied by: alpha / rank."""
    return (config.lora.alpha or config.lora.rank) / config.lora.rank


def join(trained: Mapping[str, PyTree], frozen: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """What each part's `apply` takes: its weights, or for a part in both, frozen base and trained adapters."""
    both = {part: {"base": frozen[part], "adapters": adapters} for part, adapters in trained.items() if part in frozen}
    return {**frozen, **trained, **both}


def grid_shift(pipeline: Pipeline, config: ConfigDict, pixels: int | None = None) -> float:
    """The shift of a sampler's grid: `sample.shift`, or by default the process's own at this size.

    Args:
        pixels: of the latents; by default those of squares of `data.resolution`.
    """
    downscale = pipeline.autoencoder.downscale
    pixels = pixels or (config.data.resolution // downscale) ** 2
    return config.sample.shift or make_process(config.schedule, downscale).shift_at(pixels)
