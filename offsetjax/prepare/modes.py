"""The modes of a data set's latents: their mean and variance over pictures, of squares or of each size.

Sums of one batch are float32, on the devices; they are joined in float64, as T. Chan et al. (1979) do, for the means of
latents may be far from 0 and squares would cancel. They are the same on any mesh and for any number of processes.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Complex, Float, Int, PyTree

from offsetjax.data.buckets import Limits, Size
from offsetjax.data.devices import on_devices
from offsetjax.data.sizes import Buckets, once_each
from offsetjax.data.source import Source
from offsetjax.models.encode import to_unit_range
from offsetjax.models.pipeline import Pipeline
from offsetjax.parallel import sharding
from offsetjax.progress import tracked
from offsetjax.training.objective import Batch
from offsetjax.training.streams import Batching, stream_of


class Modes(NamedTuple):
    """The mean and the variance over pictures of each mode of the latents, their orthonormal `rfft2`."""

    mean: Complex[np.ndarray, "c h w2"]
    variance: Float[np.ndarray, "c h w2"]


class _Sums:
    """Means and squared distances of pictures that come a batch at a time."""

    def __init__(self) -> None:
        self.count = 0
        self._mean: Any = np.complex128(0)
        self._squares: Any = np.float64(0)

    def add(self, mean: np.ndarray, squares: np.ndarray, count: int) -> None:
        """Those of a batch of so many pictures."""
        step = mean.astype(np.complex128) - self._mean
        total = self.count + count
        self._mean = self._mean + step * (count / total)
        self._squares = self._squares + squares + np.abs(step) ** 2 * (self.count * count / total)
        self.count = total

    def modes(self) -> Modes:
        """Of all pictures so far."""
        return Modes(np.asarray(self._mean), np.asarray(self._squares / self.count))


def measure(batching: Batching, pipeline: Pipeline, params: PyTree, source: Source, mesh: Mesh) -> Modes:
    """The modes of all pictures of a source, each once, as squares."""
    size, total = batching.global_batch_size, len(source)
    # The stream begins anew after its last picture: what comes after it in the last batch counts for nothing.
    counts = [(0, min(size, total - first)) for first in range(0, total, size)]
    [sums] = _measure(batching, pipeline, params, source, mesh, counts, None).values()
    return sums.modes()


def measure_sizes(
    batching: Batching,
    pipeline: Pipeline,
    params: PyTree,
    source: Source,
    mesh: Mesh,
    batch_sizes: Mapping[Size, int],
    limits: Limits,
) -> dict[Size, tuple[int, Modes]]:
    """Of each size how many pictures it has, and their modes, where they are two or more; see `sizes.once_each`."""
    buckets, plan = once_each(source, batch_sizes, limits, len(source))
    found = _measure(batching, pipeline, params, source, mesh, plan.batches(), buckets)
    return {buckets.sizes[size]: (sums.count, sums.modes()) for size, sums in sorted(found.items()) if sums.count > 1}


def _measure(
    batching: Batching,
    pipeline: Pipeline,
    params: PyTree,
    source: Source,
    mesh: Mesh,
    counts: list[tuple[int, int]],
    buckets: Buckets | None,
) -> dict[int, _Sums]:
    """The sums by the place of a size; `counts` has of each batch that place, and how many of its pictures count."""
    params = jax.device_put(params, sharding.shardings(mesh, (), params))
    batch_modes = _jit_batch_modes(pipeline.autoencoder, params, mesh)
    batching = replace(batching, random_flip=False, random_crop=False)
    stream = stream_of(batching, pipeline, source, mesh, buckets)
    host_batches = stream.iterator(0)
    ahead = itertools.islice(host_batches, len(counts))
    batches = on_devices(ahead, NamedSharding(mesh, sharding.BATCH), stream.whole_size)
    found: dict[int, _Sums] = {}
    try:
        shown = tracked(batches, "Measuring latents", len(counts), jax.process_index() == 0)
        for (size, count), batch in zip(counts, shown, strict=True):
            mean, squares = jax.device_get(batch_modes(params, batch, np.int32(count)))
            found.setdefault(size, _Sums()).add(mean, squares, count)
    finally:
        host_batches.close()
    return found


def _jit_batch_modes(vae: Any, params: PyTree, mesh: Mesh) -> Callable[..., tuple[Array, Array]]:
    def batch_modes(
        params: PyTree, batch: Batch, count: Int[Array, ""]
    ) -> tuple[Complex[Array, "c h w2"], Float[Array, "c h w2"]]:
        """Over the first `count` pictures: the mean of the modes, and the sum of their squared distances from it."""
        if "moments" in batch:
            means = batch["moments"][:, 0].astype(jnp.float32)
        else:  # all at once: each device then encodes its own
            means = vae.encode(params, to_unit_range(batch["pixels"]))[0]
        modes = jnp.fft.rfft2(means * vae.scaling_factor, norm="ortho")
        counts = (jnp.arange(len(modes)) < count)[:, None, None, None]
        mean = jnp.where(counts, modes, 0).sum(0) / count
        return mean, jnp.where(counts, jnp.abs(modes - mean) ** 2, 0).sum(0)

    everywhere = NamedSharding(mesh, P())
    return jax.jit(
        batch_modes,
        in_shardings=(sharding.shardings(mesh, (), params), NamedSharding(mesh, sharding.BATCH), everywhere),
        out_shardings=everywhere,
    )
