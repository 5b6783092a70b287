"""Validation losses that compare: fixed pictures, fixed timesteps and fixed noise, whatever the training's noise is.

`plain` is the unweighted error for plain noise (of a mapped flow, that of its velocity), so that runs with different
noise share one curve; `training` is that for the noise of the training. Both use the same draws for each pixel, at
every step and in every run.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, PyTree
from ml_collections import ConfigDict

from offsetjax.data.batches import EachOnce
from offsetjax.data.devices import on_devices
from offsetjax.data.source import Source
from offsetjax.data.stream import Stream
from offsetjax.diffusion.loss import mean_squared_error
from offsetjax.diffusion.noise import PLAIN, Noise
from offsetjax.diffusion.process import add_noise
from offsetjax.errors import UserError
from offsetjax.models.encode import batch_moments, encode_captions
from offsetjax.models.pipeline import Pipeline, join
from offsetjax.parallel import fsdp, sharding
from offsetjax.rng import stream_key
from offsetjax.training.objective import Batch, add_position

# trained, frozen, batch, first place, end, step → the sum over the batch, for each noise and timestep
Losses = Callable[..., dict[str, Float[Array, " t"]]]


def make_losses(pipeline: Pipeline, timesteps: Sequence[int], mesh: Mesh | None = None) -> Losses:
    """The pure function of one batch, whose examples have the places from `first` on; from `end` on none counts.

    A place decides on the draws of its example, whatever the batches are.

    Args:
        timesteps: at which the loss is taken.
        mesh: each of its devices computes the losses of its own examples, as in training.
    """
    noising, process = pipeline.noising, pipeline.noising.process
    empty_ids = pipeline.tokens("").input_ids
    is_plain = noising.noise().is_plain

    def sums(
        trained: PyTree,
        frozen: PyTree,
        batch: Batch,
        first: Int[Array, ""],
        end: Int[Array, ""],
        step: Int[Array, ""],
    ) -> dict[str, Float[Array, " t"]]:
        noises = {"plain": PLAIN} | ({} if is_plain else {"training": noising.noise(step)})
        params = join(trained, frozen)
        # The posterior's mean: a draw from it would only add noise to the curve.
        means, _ = batch_moments(pipeline.autoencoder, params.get(pipeline.family.autoencoder), batch)
        latents = means * pipeline.autoencoder.scaling_factor
        conditions = encode_captions(pipeline, params, batch["input_ids"], batch["time_ids"], empty_ids)
        places = first + batch["position"]

        def at(noise: Noise, number: Int[Array, ""]) -> Float[Array, ""]:
            key = stream_key(0, "validation", number)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, places)
            timestep = process.timestep_at(number)
            drawn = jax.vmap(noise.draw, (0, 0, None))(keys, latents, timestep)
            rate = jax.vmap(noise.rate, (0, 0, None))(keys, latents, timestep)
            noisy = jax.vmap(lambda x, n: add_noise(process, x, n, timestep))(latents, drawn)
            network_timesteps = jnp.full(len(places), process.network_timestep(timestep))
            prediction = pipeline.denoise(params, noisy, network_timesteps, conditions)
            wanted = jax.vmap(lambda x, n, r: process.target(x, n, r, timestep))(latents, drawn, rate)
            errors = jax.vmap(mean_squared_error)(prediction, wanted) * process.weight(timestep)
            return (errors * (places < end)).sum()

        numbers = jnp.asarray(timesteps, jnp.int32)
        return {name: jax.lax.map(lambda t, noise=noise: at(noise, t), numbers) for name, noise in noises.items()}

    on_devices = fsdp.sums_on_mesh(sums, mesh, pipeline.sharding, pipeline.dtypes) if mesh else sums

    def losses(trained: PyTree, frozen: PyTree, batch: Batch, *places: Int[Array, ""]) -> dict[str, Float[Array, " t"]]:
        return on_devices(trained, frozen, add_position(batch, len(batch["time_ids"])), *places)

    return losses


def validate(
    losses: Losses,
    settings: ConfigDict,
    stream: Stream,
    mesh: Mesh,
    params: PyTree,
    frozen: PyTree,
    step: int = 0,
) -> dict[str, float]:
    """The mean of each noise, over pictures and timesteps, and at each timestep: `validation_plain`, `…_t999`.

    Of pictures of several sizes also the mean over those of each, `validation_plain_1152x896`.

    Args:
        settings: the section `validation` of a config; where it asks for more pictures than there are, it is all.
        step: after which the training's noise is as strong as `noise.anneal` says.
    """
    counts = _counts(settings.num_examples, stream)
    host_batches = stream.iterator()
    try:
        batches = on_devices(host_batches, NamedSharding(mesh, sharding.BATCH), stream.whole_size, ahead=0)
        ends = list(itertools.accumulate(count for _, count in counts))
        firsts = [0, *ends[:-1]]
        given = [(jnp.int32(first), jnp.int32(end), jnp.int32(step)) for first, end in zip(firsts, ends, strict=True)]
        sums = jax.device_get([losses(params, frozen, next(batches), *each) for each in given])
    finally:
        host_batches.close()

    def mean(of_size: str | None = None) -> dict[str, Any]:
        chosen = [place for place, (size, _) in enumerate(counts) if of_size in (None, size)]
        count = sum(counts[place][1] for place in chosen)
        return jax.tree.map(lambda *values: sum(values) / count, *(sums[place] for place in chosen))

    total = mean()
    named = {f"validation_{name}": float(values.mean()) for name, values in total.items()}
    for name, values in total.items():
        each = zip(settings.timesteps, values, strict=True)
        named |= {f"validation_{name}_t{timestep}": float(value) for timestep, value in each}
    sizes = dict.fromkeys(size for size, _ in counts)
    for size in sizes if len(sizes) > 1 else ():
        named |= {f"validation_{name}_{size}": float(values.mean()) for name, values in mean(size).items()}
    return named


def _counts(num_examples: int, stream: Stream) -> list[tuple[str, int]]:
    """Of each batch, its size and how many of its examples count."""
    if stream.buckets and isinstance(stream.buckets.plan, EachOnce):
        return [(str(stream.buckets.sizes[size]), count) for size, count in stream.buckets.plan.batches()]
    total, size = min(num_examples, len(stream.source)), stream.global_batch_size
    return [("", min(size, total - first)) for first in range(0, total, size)]


def check_apart(training: Source, validation: Source) -> None:
    """Refuses a hold-out that shares pictures with the training data.

    Raises:
        UserError: it does.
    """
    if training.shares_records(validation):
        raise UserError(
            f"config: validation.split = {validation.label} has pictures of data.split = {training.label}; take them "
            "apart, such as 'train[:95%]' and 'train[95%:]'"
        )
