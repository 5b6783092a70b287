"""The batches of a training, and what they must go with: the sizes of its pictures, the cache of its latents.

`data/stream.py` has the batches themselves; what a config and a mesh say of them is here.
"""

import json
import logging
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float, PyTree
from ml_collections import ConfigDict

from offsetjax.data.buckets import Limits
from offsetjax.data.sizes import Buckets, make_buckets
from offsetjax.data.source import check_crops
from offsetjax.data.stream import Stream, make_stream
from offsetjax.errors import UserError
from offsetjax.models.encode import encoder_checksum, to_unit_range
from offsetjax.models.pipeline import Pipeline
from offsetjax.models.resolve import resolution_unit
from offsetjax.parallel import sharding
from offsetjax.parallel.processes import differing

_log = logging.getLogger("offsetjax")

Statistics = tuple[Float[np.ndarray, " c"], Float[np.ndarray, " c"]]  # the mean and the deviation of each channel


def open_stream(
    config: ConfigDict, pipeline: Pipeline, source: Any, mesh: Mesh | None = None, buckets: Buckets | None = None
) -> Stream:
    """The training batches: the rows that this process's devices of the mesh hold; without a mesh, all of them.

    Args:
        buckets: in place of those that the config gives.

    Raises:
        UserError: sizes that do not fit, or processes of one mesh whose data differ.
    """
    global_batch_size = config.train.global_batch_size
    batch = NamedSharding(mesh, sharding.BATCH) if mesh else None
    if buckets is None and (buckets := open_buckets(config, source)):
        for line in buckets.describe():
            _log.info("  %s", line)
        for line in buckets.notes:
            _log.warning("%s", line)
    sizes = set(buckets.plan.batch_sizes) if buckets else {global_batch_size}
    if config.data.random_crop:
        check_crops(source)
    if mesh:
        _check_divide(config, mesh, sizes)
    stream = make_stream(
        source,
        seed=config.seed,
        global_batch_size=global_batch_size,
        resolution=config.data.resolution,
        random_flip=config.data.random_flip,
        tokenize=pipeline.tokens,
        long_captions=config.encode.long_captions,
        num_workers=config.data.num_workers,
        rows={size: sharding.rows_of_process(batch, size) for size in sizes} if batch else None,
        max_bad_fraction=config.data.max_bad_fraction,
        buckets=buckets,
        random_crop=config.data.random_crop,
    )
    # Each would train on its own; or, where sizes differ, wait for the others for ever.
    if mesh and (others := differing(json.dumps(stream.fingerprint(), sort_keys=True))):
        raise UserError(
            f"data: {source.label} is not the same for all processes: that of {', '.join(map(str, others))} differs "
            "from that of process 0; copy the data set again to where it differs, or give one place that all read"
        )
    return stream


def open_buckets(config: ConfigDict, source: Any) -> Buckets | None:
    """The sizes of the training's pictures, and the batches of each; None where all are cut to one square.

    Raises:
        UserError: sizes that do not fit the networks or the pictures.
    """
    data = config.data
    if not (data.buckets or data.bucket_count):
        return None
    return make_buckets(
        source,
        given=data.buckets,
        count=data.bucket_count,
        resolution=data.resolution,
        step=data.bucket_step,
        unit=resolution_unit(config),
        limits=limits_of(data),
        batch_size=config.train.global_batch_size,
        seed=config.seed,
        max_bad_fraction=data.max_bad_fraction,
        equal_tokens=data.equal_tokens,
    )


def _check_divide(config: ConfigDict, mesh: Mesh, batch_sizes: Iterable[int]) -> None:
    """Refuses batches that do not divide; that of `train.global_batch_size` has been looked at with the mesh."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * config.train.accumulate_steps
    if any(size % parts for size in batch_sizes) and config.data.equal_tokens:
        raise UserError(
            f"config: data.equal_tokens = {config.data.equal_tokens} must be a multiple of mesh.data x mesh.fsdp x "
            f"train.accumulate_steps = {parts}, among which each batch is divided"
        )


def limits_of(data: ConfigDict) -> Limits:
    """The limits of the section `data` of a config."""
    return Limits(data.max_aspect, data.max_enlargement or float("inf"))


def of_squares(config: ConfigDict) -> ConfigDict:
    """A copy of the config that takes the central square of every picture, as all but the training itself does."""
    config = config.copy_and_resolve_references()
    config.data.buckets, config.data.bucket_count = (), 0
    return config


def latent_statistics(config: ConfigDict, pipeline: Pipeline, vae_params: PyTree, source: Any) -> Statistics:
    """The mean and the standard deviation of each channel of the latents, over 256 of the data's pictures.

    They are the first of the training's order, again and again where there are fewer. Of a cache, those by which its
    autoencoder was standardised.

    Raises:
        UserError: it was not.
    """
    if config.data.cached_latents:
        return source.cache.statistics(source.label, f"model.{pipeline.family.autoencoder}.scaling_factor")
    sampled = of_squares(config)
    sampled.train.global_batch_size, sampled.data.random_flip, sampled.data.random_crop = 8, False, False
    batches = open_stream(sampled, pipeline, source).iterator(0)
    encode = jax.jit(lambda pixels: pipeline.autoencoder.encode(vae_params, to_unit_range(pixels))[0])
    latents = np.concatenate([np.asarray(encode(next(batches)["pixels"])) for _ in range(32)])
    batches.close()
    return latents.mean((0, 2, 3)), latents.std((0, 2, 3))


def check_cache(config: ConfigDict, source: Any, pipeline: Pipeline, vae_params: PyTree) -> None:
    """Raises a UserError where the data are latents that this autoencoder would not make of their pictures."""
    if config.data.cached_latents:
        buckets = open_buckets(config, source)
        sizes = [str(size) for size in buckets.sizes] if buckets else []
        source.cache.check(source.label, config.data, encoder_checksum(pipeline.autoencoder, vae_params), sizes)
