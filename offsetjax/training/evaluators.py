"""What a training evaluates now and then: sample grids, validation losses and the brightness of what it draws.

Each evaluator is a function of the train state alone, with fixed pictures, prompts, seeds and noise, so that its values
compare between steps and between runs.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, PyTree

from offsetjax.data.brightness import compare, data_brightness
from offsetjax.data.source import Source, open_data
from offsetjax.models.pipeline import for_training
from offsetjax.models.task import task_of
from offsetjax.parallel import sharding
from offsetjax.sampling.pictures import Picture
from offsetjax.sampling.sample import Sampler, about_samples, draw_pictures, make_sampler
from offsetjax.training.setup import Run
from offsetjax.training.step import TrainState
from offsetjax.training.streams import Batching, batching_of, held_out_buckets, open_buckets, stream_of
from offsetjax.training.validation import check_apart, make_losses, validate

_log = logging.getLogger("offsetjax")


@dataclass(frozen=True)
class Evaluation:
    """What an evaluator found: named values, named grids of pictures, and how these were drawn."""

    scalars: Mapping[str, float] = field(default_factory=dict)
    images: Mapping[str, Sequence[Picture]] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)


Evaluate = Callable[[TrainState, int], Evaluation]


@dataclass(frozen=True)
class Evaluator:
    """`evaluate(state, step)` is called at each multiple of `every_steps` and at the end."""

    every_steps: int
    evaluate: Evaluate

    def is_due(self, step: int, num_steps: int) -> bool:
        return step % self.every_steps == 0 or step == num_steps


def open_evaluators(run: Run, source: Source) -> list[Evaluator]:
    """The evaluators that a config asks for.

    Raises:
        UserError: a hold-out that cannot be read, or that shares pictures with the training data.
    """
    return list(task_of(run.config).evaluators(run, source))


def of_diffusion(run: Run, source: Source) -> Iterator[Evaluator]:
    """Sample grids, validation losses and the brightness of what is drawn, of a model that draws from prompts."""
    config = run.config
    resolution, sample = config.data.resolution, config.sample
    # Nothing is compiled before its first use.
    sampler = make_sampler(run.pipeline, sample, resolution, config.seed, run.mesh)
    if sample.every_steps and sample.prompts:
        yield Evaluator(sample.every_steps, _sample(run, sampler))
    if config.validation.every_steps:
        yield Evaluator(config.validation.every_steps, _validation(run, source))
    if config.probe.every_steps:
        if sample.brightness:  # no start is moved
            still = sample.copy_and_resolve_references()
            still.brightness = ()
            sampler = make_sampler(run.pipeline, still, resolution, 0, run.mesh)
        sampler = dataclasses.replace(sampler, seed=0)  # the same starts in every run
        yield Evaluator(config.probe.every_steps, _probe(run, sampler, source))


def _evaluated(run: Run, state: TrainState) -> PyTree:
    return state.ema_params if run.config.sample.params == "ema" else state.params


def _draw(
    run: Run, sampler: Sampler, state: TrainState, step: int, prompts: tuple[str, ...], num_seeds: int
) -> list[Picture]:
    params = _evaluated(run, state)
    return draw_pictures(sampler, params, run.frozen, prompts, range(num_seeds), step)


def _about(run: Run, step: int) -> dict[str, Any]:
    return about_samples(run.config.sample, run.config.data.resolution, step, run.config.sample.params)


def _sample(run: Run, sampler: Sampler) -> Evaluate:
    sample = run.config.sample

    def evaluate(state: TrainState, step: int) -> Evaluation:
        pictures = _draw(run, sampler, state, step, sample.prompts, sample.seeds_per_prompt)
        return Evaluation(images={f"step_{step}": pictures}, about=_about(run, step))

    return evaluate


def _probe(run: Run, sampler: Sampler, source: Source) -> Evaluate:
    probe, data = run.config.probe, run.config.data
    may_be_bad = data.max_bad_fraction > 0  # training counts them, and ends where they are too many

    @functools.cache
    def measured() -> Float[np.ndarray, " n"]:
        buckets = open_buckets(run.config, source)
        size_of = buckets.assignment.size_of if buckets else None
        return data_brightness(source, data.resolution, may_be_bad=may_be_bad, size_of=size_of)

    def evaluate(state: TrainState, step: int) -> Evaluation:
        pictures = _draw(run, sampler, state, step, probe.prompts, probe.seeds_per_prompt)
        if jax.process_index() != 0:  # who writes no metrics need not read the data for them
            return Evaluation()
        values = compare([picture.brightness for picture in pictures], measured())
        scalars = {f"brightness_{name}": value for name, value in values.items()}
        return Evaluation(scalars, {f"probe_{step}": pictures}, _about(run, step))

    return evaluate


def validation_batching(training: Batching, accumulate_steps: int) -> Batching:
    """A validation's batches: the same pictures and captions in every run, each once whatever sizes are trained."""
    size = training.global_batch_size // accumulate_steps  # as much as the devices hold in training
    fixed = dataclasses.replace(
        training, random_flip=False, random_crop=False, captions=training.captions.without_draws()
    )
    return dataclasses.replace(fixed, seed=0, global_batch_size=size)


def _validation(run: Run, source: Source) -> Evaluate:
    data, settings = run.config.data, run.config.validation
    batching = validation_batching(batching_of(run.config), run.config.train.accumulate_steps)
    held_out = open_data(data, settings.split)
    check_apart(source, held_out)
    if buckets := held_out_buckets(run.config, source, held_out):
        for line in buckets.notes:
            _log.warning("validation: %s", line)
        shown = sum(map(len, buckets.plan.groups))
        _log.info("validation: %d of %d pictures, at the sizes of the training", shown, len(held_out))
    stream = stream_of(batching, run.pipeline, held_out, run.mesh, buckets)
    frozen = sharding.shardings(run.mesh, run.pipeline.sharding, run.step_frozen)
    replicated = NamedSharding(run.mesh, P())
    # Kernels and loops as in training, so that what fits there fits here; the latents are exact.
    platform = run.mesh.devices.flat[0].platform
    as_trained = for_training(run.pipeline, data.resolution, platform, run.mesh.shape["fsdp"])
    exact = {run.pipeline.family.autoencoder: run.pipeline.autoencoder}
    pipeline = dataclasses.replace(as_trained, parts={**as_trained.parts, **exact})
    losses = jax.jit(
        make_losses(pipeline, settings.timesteps, run.mesh),
        in_shardings=(None, frozen, NamedSharding(run.mesh, sharding.BATCH), replicated, replicated, replicated),
        out_shardings=replicated,
    )

    def evaluate(state: TrainState, step: int) -> Evaluation:
        found = validate(losses, settings, stream, run.mesh, _evaluated(run, state), run.step_frozen, step)
        if wrong := [name for name, value in found.items() if not math.isfinite(value)]:
            _log.warning("step %d: the validation loss is not finite: %s", step, ", ".join(wrong))
        return Evaluation(found)

    return evaluate
