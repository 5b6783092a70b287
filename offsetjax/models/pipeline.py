"""All parts of a latent diffusion model, built from a config, without weights; and how a run trains them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree
from ml_collections import ConfigDict

from offsetjax.diffusion.density import make_density
from offsetjax.diffusion.noise import make_noise
from offsetjax.diffusion.noising import Noising
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
    """The parts of a family's model, without weights, and how a run trains them.

    Attributes:
        parts: the networks by name.
        noising: of the training, by whose process and from whose noise pictures are drawn.
        settings: what the config's `model` says beside the parts' architectures.
        tokenizers: by text encoder; an autoencoder's training has none.
        needed: the parts with weights that the run needs.
        trained: those that it trains, whole or by their adapters.
        adapted: those of them that have adapters.
    """

    family: Family
    parts: Mapping[str, Any]
    noising: Noising
    settings: Mapping[str, Any] = field(default_factory=dict)
    tokenizers: Mapping[str, Any] = field(default_factory=dict)
    needed: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()

    @property
    def frozen(self) -> tuple[str, ...]:
        """The parts whose weights do not change: with adapters, all."""
        return tuple(part for part in self.needed if part not in self.trained or part in self.adapted)

    @property
    def denoiser(self) -> Any:
        return self.parts[self.family.denoiser]

    @property
    def autoencoder(self) -> Any:
        return self.parts[self.family.autoencoder]

    def latent_shape(self, width: int, height: int | None = None) -> tuple[int, int, int]:
        """`(c, h, w)` of pictures of so many pixels; of squares where no height is given."""
        vae = self.autoencoder
        return vae.latent_channels, (width if height is None else height) // vae.downscale, width // vae.downscale

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
    return task_of(config).parts(family_of(config.model))


def is_from_scratch(model: ConfigDict, part: str) -> bool:
    """Whether a part is drawn at random rather than loaded, by the section `model` of a config."""
    return not model.pretrained or part in model.from_scratch


def build(config: ConfigDict, tokenizers: Mapping[str, Any] | None = None) -> Pipeline:
    """The parts of `config.model`, with `config.lora.rank` those that are trained with adapters.

    Args:
        tokenizers: by text encoder.
    """
    family, task = family_of(config.model), task_of(config)
    parts = family.build(config.model, jnp.dtype(config.model.dtype))
    trained = task.trained(family, config.train.text_encoders)
    if config.lora.rank:
        parts |= {part: Adapted(parts[part], adapter_scale(config.lora)) for part in trained}
    return Pipeline(
        family=family,
        parts=parts,
        noising=noising_of(config, parts[family.autoencoder].downscale),
        settings={name: value for name, value in config.model.items() if not isinstance(value, ConfigDict)},
        tokenizers=dict(tokenizers or {}),
        needed=task.parts(family),
        trained=trained,
        adapted=trained if config.lora.rank else (),
    )


def noising_of(config: ConfigDict, downscale: int) -> Noising:
    """How a config's training noises latents.

    Args:
        downscale: pixels of a picture a latent pixel, on a side.
    """
    process, train, loss = make_process(config.schedule, downscale), config.train, config.loss
    steps, least, most = config.schedule.num_train_timesteps, loss.min_timestep, loss.max_timestep
    density = make_density(config.timesteps, steps, least, most, train.global_batch_size)
    return Noising(process, density, make_noise(config.noise, process, downscale), config.noise, train.steps)


def for_training(pipeline: Pipeline, resolution: int, platform: str, num_shards: int = 1) -> Pipeline:
    """The pipeline as it is trained, to be traced by each device for itself; what it computes carries the parts' names.

    The denoiser has `model.attention`, `model.remat` and, as the text encoders have, `model.scan_layers`. Pictures are
    encoded in the compute type, as by other trainers (latents move by 1 % of their standard deviation, their means by
    less), where the family allows it and the autoencoder is not itself trained.

    Args:
        resolution: of the pictures, in pixels.
        num_shards: that FSDP splits a weight into.

    Raises:
        UserError: the platform ("tpu", "gpu" or "cpu") or the pictures' size has no use for the kernel that is named.
    """
    setting = pipeline.settings["attention"]
    try:
        kernel = attention.kernel_of(setting, platform, pipeline.denoiser.dtype)
    except ValueError as error:
        raise UserError(f"config: model.attention = {setting}: {error}; auto takes what fits") from None
    longest = (resolution // pipeline.autoencoder.downscale) ** 2
    lengths = pipeline.denoiser.attention_lengths(longest)
    if setting in ("splash", "cudnn") and not any(attention.takes_kernel(setting, n, n, channels=1) for n in lengths):
        raise UserError(
            f"config: model.attention = {setting} takes {attention.SHORTEST} positions and more, and "
            f"data.resolution = {resolution} gives the blocks {', '.join(map(str, lengths))}; "
            "auto takes what fits"
        )

    scan, remat = pipeline.settings["scan_layers"], pipeline.settings["remat"]
    is_scanned = scan == "always" or (scan == "auto" and num_shards >= _SHARDS_TO_SCAN)

    family, parts = pipeline.family, dict(pipeline.parts)
    if family.autoencoder not in pipeline.trained and family.encodes_in_half:
        parts[family.autoencoder] = replace(pipeline.autoencoder, dtype=pipeline.denoiser.dtype)
    trained = lora.ARRAYS if isinstance(pipeline.denoiser, Adapted) else None
    parts[family.denoiser] = _traced(pipeline.denoiser, Tracing(kernel, remat, is_scanned, trained))
    parts |= {part: _traced(parts[part], Tracing(is_scanned=is_scanned)) for part in family.encoders}
    return replace(pipeline, parts={part: Named(part, model) for part, model in parts.items()})


def _traced(model: Any, tracing: Tracing) -> Any:
    if isinstance(model, Adapted):
        return replace(model, model=_traced(model.model, tracing))
    return replace(model, tracing=tracing)


def adapter_scale(adapters: ConfigDict) -> float:
    """What the output of adapters, by the section `lora` of a config, is multiplied by: alpha / rank."""
    return (adapters.alpha or adapters.rank) / adapters.rank


def join(trained: Mapping[str, PyTree], frozen: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """What each part's `apply` takes: its weights, or for a part in both, frozen base and trained adapters."""
    both = {part: {"base": frozen[part], "adapters": adapters} for part, adapters in trained.items() if part in frozen}
    return {**frozen, **trained, **both}


def grid_shift(pipeline: Pipeline, shift: float, pixels: int) -> float:
    """The shift of a sampler's grid: `sample.shift`, or where that is 0 the process's own for so many latent pixels."""
    return shift or pipeline.noising.process.shift_at(pixels)
