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
from offsetjax.diffusion.density import make_density
from offsetjax.diffusion.noise import Noise
from offsetjax.diffusion.process import make_process
from offsetjax.diffusion.spread import DEFAULT_DEVIATION, Drawing, Reach, reach
from offsetjax.errors import UserError
from offsetjax.models.pipeline import Pipeline, grid_shift, training_noise
from offsetjax.sampling.size import latent_shape

ENOUGH = 0.9  # of the spread
_TRAINED = 0.001  # the share of a training below which a place is as good as never seen
_STRENGTHS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)


def deviations(config: ConfigDict) -> Any:
    """The standard deviation of each channel's mean that the config knows of the data; None: nothing was measured."""
    noise = config.noise
    found = np.array(noise.data_mean_std)
    if noise.calibration:
        # What it filled in is in the config: a run is resumed, and drawn from, where the file is no more.
        with contextlib.suppress(UserError):
            found = np.sqrt(read_calibration(noise.calibration).mean_variance)
    return found if found.size and found.min() > 0 else None


def brightness_reach(
    pipeline: Pipeline, config: ConfigDict, noise: Noise | None = None, is_exported: bool = False
) -> Reach:
    """What becomes of brightness.

    Args:
        noise: of training, in the place of the config's.
        is_exported: whether others' programs draw, whose grids are those of the process that the network knows.
    """
    measured = deviations(config)
    _, height, width = latent_shape(pipeline, config)
    process = make_process(config.schedule, pipeline.autoencoder.downscale)
    return reach(
        process.exported if is_exported else process,
        noise or training_noise(pipeline, config),
        make_density(config),
        drawing(pipeline, config),
        DEFAULT_DEVIATION if measured is None else measured,
        height,
        width,
    )


def drawing(pipeline: Pipeline, config: ConfigDict) -> Drawing:
    """How a config's pictures are drawn."""
    sample = config.sample
    _, height, width = latent_shape(pipeline, config)
    return Drawing(sample.sampler, sample.num_steps, sample.spacing, grid_shift(pipeline, config, height * width))


def about_data(config: ConfigDict) -> str:
    """By which spread of the data the numbers are."""
    if deviations(config) is not None:
        return "for the data's own spread"
    return f"for latents whose channel means have a standard deviation of {DEFAULT_DEVIATION:g}, which is assumed"


def training_advice(pipeline: Pipeline, config: ConfigDict) -> Iterator[str]:
    """One line where a training's sampler or density cannot reach the data's spread of brightness."""
    last = training_noise(pipeline, config, config.train.steps)
    found, steps = brightness_reach(pipeline, config, last), config.sample.num_steps
    is_plain_start = config.sample.start_noise == "plain" and not last.is_plain
    spread = found.plain if is_plain_start else found.matched
    facts = []
    if spread < ENOUGH:
        start = " from plain noise" if is_plain_start else ""
        facts.append(f"{steps} steps{start} return {spread:.0%} of it")
    if found.equal < 1.0 and found.trained < _TRAINED:
        timestep = found.equal * config.schedule.num_train_timesteps
        facts.append(f"{_percent(found.trained)} of the training is above timestep {timestep:.0f}, where it is decided")
    if facts:
        remedy = _remedy(pipeline, config, found, is_plain_start)
        yield f"the spread of brightness: {', and '.join(facts)} ({about_data(config)}); {remedy}"
    annealed, decay = round(config.noise.anneal * config.train.steps), config.optimizer.ema_decay
    if annealed and decay and config.sample.params == "ema" and annealed * (1.0 - decay) < 6.0:
        yield (
            f"noise.anneal: over {annealed} steps the noise becomes plain, and optimizer.ema_decay = {decay:g} "
            f"averages over some {1 / (1 - decay):.0f}, so that the average will not have forgotten it; anneal over "
            f"{6 / (1 - decay):.0f} steps and more, or draw with sample.params = 'raw'"
        )


def start_in_words(pipeline: Pipeline, config: ConfigDict, step: int) -> str:
    """What the start of sampling is to the spread of brightness of an exported model, in numbers: a sentence.

    Args:
        step: of the model.
    """
    noise, sample = training_noise(pipeline, config, step), config.sample
    found = brightness_reach(pipeline, config, noise, is_exported=True)
    text = (
        f"of the data's spread of brightness {sample.num_steps} steps of {sample.sampler} return {found.matched:.0%} "
    )
    text += "from plain noise, the noise of training" if noise.is_plain else "from the noise of training"
    text += "" if noise.is_plain else f", and {found.plain:.0%} from plain noise"
    return f"{text}, {about_data(config)}"


def start_warning(pipeline: Pipeline, config: ConfigDict, step: int) -> Iterator[str]:
    """One line where pictures are drawn from plain noise by a model that was trained with another.

    Args:
        step: of the model.
    """
    noise = training_noise(pipeline, config, step)
    if config.sample.start_noise != "plain" or noise.is_plain:
        return
    found = brightness_reach(pipeline, config, noise)
    if found.plain < found.matched:
        yield (
            f"a start of plain noise returns {found.plain:.0%} of the spread of brightness, the noise of training "
            f"{found.matched:.0%} ({about_data(config)}); use sample.start_noise = 'matched'"
        )


def _remedy(pipeline: Pipeline, config: ConfigDict, found: Reach, is_plain_start: bool) -> str:
    if is_plain_start and found.matched > found.plain + 0.05:
        return f"sample.start_noise='matched' returns {found.matched:.0%}"
    if config.noise.anneal:
        return f"noise.anneal=0 returns {brightness_reach(pipeline, config).matched:.0%}, from the noise of training"
    noise, best = training_noise(pipeline, config), (0.0, found)
    if noise.kind != "spectral":
        for strength in (each for each in _STRENGTHS if each > noise.strengths.max()):
            tried = brightness_reach(pipeline, config, replace(noise, strengths=np.array([strength])))
            better = tried.matched > best[1].matched + 0.01 or tried.trained > 2 * best[1].trained
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
