"""What a config's sampler and density make of the spread of brightness, in numbers, before anything is trained.

`spread.py` has the algebra: it is that of normal data and the exact denoiser, and so the most that a training can reach
but for what a network makes up where it was not trained.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from offsetjax.diffusion.calibration import read_calibration
from offsetjax.diffusion.noise import Noise
from offsetjax.diffusion.sampler import ANCESTRAL
from offsetjax.diffusion.spread import DEFAULT_DEVIATION, Drawing, Reach, reach
from offsetjax.errors import UserError
from offsetjax.models.pipeline import Pipeline, grid_shift
from offsetjax.sampling.size import drawn_size

ENOUGH = 0.9  # of the spread
_TRAINED = 0.001  # the share of a training below which a place is as good as never seen
_STRENGTHS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)


def deviations(noise: ConfigDict) -> Any:
    """The standard deviation of each channel's mean that the section `noise` of a config knows of the data.

    None: nothing was measured.
    """
    found = np.array(noise.data_mean_std)
    if noise.calibration:
        # What it filled in is in the config: a run is resumed, and drawn from, where the file is no more.
        with contextlib.suppress(UserError):
            found = np.sqrt(read_calibration(noise.calibration).mean_variance)
    return found if found.size and found.min() > 0 else None


def brightness_reach(
    pipeline: Pipeline, sample: ConfigDict, resolution: int, noise: Noise | None = None, is_exported: bool = False
) -> Reach:
    """What becomes of brightness.

    Args:
        sample: the section of a config, as in all of these.
        resolution: of the training's pictures, in pixels.
        noise: of training, in the place of the pipeline's.
        is_exported: whether others' programs draw, whose grids are those of the process that the network knows.
    """
    noising, (_, height, width) = pipeline.noising, pipeline.latent_shape(*drawn_size(sample, resolution))
    measured, noise = deviations(noising.settings), noise or noising.noise()
    process, drawn = noising.process, drawing(pipeline, sample, resolution)
    if is_exported:
        process = process.exported
        drawn = replace(drawn, sampler=process.exported_sampler(matched_sampler(pipeline, sample.sampler, noise)))
    return reach(
        process,
        noise,
        noising.density,
        drawn,
        DEFAULT_DEVIATION if measured is None else measured,
        height,
        width,
    )


def matched_sampler(pipeline: Pipeline, sampler: str, noise: Noise) -> str:
    """The sampler, like the one that is given, whose PyTorch scheduler needs nothing but matched initial latents.

    PyTorch's ancestral schedulers inject plain noise, which is right for plain and for `adjusted` noise alone; its
    deterministic ones are right for all noise but `adjusted`.
    """
    if noise.is_plain:
        return sampler
    if noise.kind == "adjusted" and not pipeline.noising.process.includes_rate:
        return sampler if sampler in ANCESTRAL else "euler_ancestral"
    return "ddim" if sampler in ANCESTRAL else sampler


def drawing(pipeline: Pipeline, sample: ConfigDict, resolution: int) -> Drawing:
    """How pictures are drawn."""
    _, height, width = pipeline.latent_shape(*drawn_size(sample, resolution))
    return Drawing(sample.sampler, sample.num_steps, sample.spacing, grid_shift(pipeline, sample.shift, height * width))


def about_data(noise: ConfigDict) -> str:
    """By which spread of the data the numbers are."""
    if deviations(noise) is not None:
        return "for the data's own spread"
    return f"for latents whose channel means have a standard deviation of {DEFAULT_DEVIATION:g}, which is assumed"


def training_advice(pipeline: Pipeline, sample: ConfigDict, resolution: int, ema_decay: float) -> Iterator[str]:
    """One line where a training's sampler or density cannot reach the data's spread of brightness.

    Args:
        ema_decay: of the average of the weights.
    """
    noising, steps = pipeline.noising, sample.num_steps
    last, anneal = noising.noise(noising.num_steps), noising.settings.anneal
    found = brightness_reach(pipeline, sample, resolution, last)
    is_plain_start = sample.start_noise == "plain" and not last.is_plain
    spread = found.plain if is_plain_start else found.matched
    facts = []
    if spread < ENOUGH:
        start = " from plain noise" if is_plain_start else ""
        facts.append(f"{steps} steps{start} return {spread:.0%} of it")
    if found.equal < 1.0 and found.trained < _TRAINED:
        timestep = found.equal * noising.process.num_train_timesteps
        facts.append(f"{_percent(found.trained)} of the training is above timestep {timestep:.0f}, where it is decided")
    if facts:
        remedy = _remedy(pipeline, sample, resolution, found, is_plain_start)
        yield f"the spread of brightness: {', and '.join(facts)} ({about_data(noising.settings)}); {remedy}"
    annealed = round(anneal * noising.num_steps)
    if annealed and ema_decay and sample.params == "ema" and annealed * (1.0 - ema_decay) < 6.0:
        yield (
            f"noise.anneal: over {annealed} steps the noise becomes plain, and optimizer.ema_decay = {ema_decay:g} "
            f"averages over some {1 / (1 - ema_decay):.0f}, so that the average will not have forgotten it; anneal "
            f"over {6 / (1 - ema_decay):.0f} steps and more, or draw with sample.params = 'raw'"
        )


def start_in_words(pipeline: Pipeline, sample: ConfigDict, resolution: int, step: int) -> str:
    """What the start of sampling is to the spread of brightness of an exported model, in numbers: a sentence.

    Args:
        step: of the model.
    """
    noise = pipeline.noising.noise(step)
    found = brightness_reach(pipeline, sample, resolution, noise, is_exported=True)
    sampler = pipeline.noising.process.exported.exported_sampler(matched_sampler(pipeline, sample.sampler, noise))
    text = f"of the data's spread of brightness {sample.num_steps} steps of {sampler} return {found.matched:.0%} "
    text += "from plain noise, the noise of training" if noise.is_plain else "from the noise of training"
    text += "" if noise.is_plain else f", and {found.plain:.0%} from plain noise"
    return f"{text}, {about_data(pipeline.noising.settings)}"


def start_warning(pipeline: Pipeline, sample: ConfigDict, resolution: int, step: int) -> Iterator[str]:
    """One line where pictures are drawn from plain noise by a model that was trained with another.

    Args:
        step: of the model.
    """
    noise = pipeline.noising.noise(step)
    if sample.start_noise != "plain" or noise.is_plain:
        return
    found = brightness_reach(pipeline, sample, resolution, noise)
    if found.plain < found.matched:
        yield (
            f"a start of plain noise returns {found.plain:.0%} of the spread of brightness, the noise of training "
            f"{found.matched:.0%} ({about_data(pipeline.noising.settings)}); use sample.start_noise = 'matched'"
        )


def _remedy(pipeline: Pipeline, sample: ConfigDict, resolution: int, found: Reach, is_plain_start: bool) -> str:
    if is_plain_start and found.matched > found.plain + 0.05:
        return f"sample.start_noise='matched' returns {found.matched:.0%}"
    if pipeline.noising.settings.anneal:
        reached = brightness_reach(pipeline, sample, resolution).matched
        return f"noise.anneal=0 returns {reached:.0%}, from the noise of training"
    noise, best = pipeline.noising.noise(), (0.0, found)
    if noise.kind != "spectral":
        for strength in (each for each in _STRENGTHS if each > noise.strengths.max()):
            tried = brightness_reach(pipeline, sample, resolution, replace(noise, strengths=np.array([strength])))
            returned, before = tried.matched, best[1].matched
            better = returned > before + 0.01 or (returned > before - 0.01 and tried.trained > 2 * best[1].trained)
            best = (strength, tried) if better else best
            if tried.matched >= ENOUGH and tried.trained >= _TRAINED:
                break
    strength, tried = best
    if strength == 0.0:
        return "take more sample.num_steps, or trailing spacing"
    trained = (
        f", with {_percent(tried.trained)} of the training there"
        if found.trained < _TRAINED and tried.equal < 1.0
        else ""
    )
    return f"noise.offset_strength={strength:g} returns {tried.matched:.0%}{trained}"


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%"
