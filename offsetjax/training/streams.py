"""The batches of a training, and what they must go with: the sizes of its pictures, the cache of its latents.

`data/stream.py` has the batches themselves; what a config and a mesh say of them is here.
"""

import json
import logging
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float, PyTree
from ml_collections import ConfigDict

from offsetjax.config import stages_of
from offsetjax.data.buckets import Limits, Size
from offsetjax.data.caption_rules import CaptionRules
from offsetjax.data.sizes import Buckets, make_buckets, once_each
from offsetjax.data.source import Source, check_crops, open_data
from offsetjax.data.stream import Stream, make_stream
from offsetjax.errors import UserError
from offsetjax.models.encode import encoder_checksum, to_unit_range
from offsetjax.models.pipeline import Pipeline
from offsetjax.models.resolve import resolution_unit
from offsetjax.parallel import sharding
from offsetjax.parallel.processes import differing

_log = logging.getLogger("offsetjax")

Statistics = tuple[Float[np.ndarray, " c"], Float[np.ndarray, " c"]]  # the mean and the deviation of each channel


@dataclass(frozen=True)
class Batching:
    """What the batches of a stream depend on, beside its pictures; as `make_stream` has them."""

    seed: int
    global_batch_size: int
    resolution: int
    random_flip: bool
    random_crop: bool
    long_captions: Literal["truncate", "refuse"]
    num_workers: int
    max_bad_fraction: float
    captions: CaptionRules


def batching_of(config: ConfigDict) -> Batching:
    """The batches of a config's training."""
    data = config.data
    return Batching(
        seed=config.seed,
        global_batch_size=config.train.global_batch_size,
        resolution=data.resolution,
        random_flip=data.random_flip,
        random_crop=data.random_crop,
        long_captions=config.encode.long_captions,
        num_workers=data.num_workers,
        max_bad_fraction=data.max_bad_fraction,
        captions=CaptionRules(**config.captions),
    )


def open_sources(config: ConfigDict) -> tuple[Source, ...]:
    """The data of each stage of a config; a data set that several read is opened once.

    Raises:
        UserError: one cannot be read.
    """
    opened: dict[tuple[str, str], Source] = {}
    sources = []
    for stage in stages_of(config):
        data = stage.config(config).data
        where = (data.path, data.split)
        if where not in opened:
            with stage.named():
                opened[where] = open_data(data)
        sources.append(opened[where])
    return tuple(sources)


def open_stream(config: ConfigDict, pipeline: Pipeline, source: Any, mesh: Mesh | None = None) -> Stream:
    """The training batches, of the config's sizes; otherwise as `stream_of`.

    Raises:
        UserError: sizes that do not fit, or processes of one mesh whose data differ.
    """
    buckets = open_buckets(config, source)
    for line in buckets.describe() if buckets else ():
        _log.info("  %s", line)
    for line in buckets.notes if buckets else ():
        _log.warning("%s", line)
    check_batches(config, source, mesh, buckets)
    stream = stream_of(batching_of(config), pipeline, source, mesh, buckets)
    return replace(stream, parts=parts_of_sizes(config))


def stream_of(
    batching: Batching, pipeline: Pipeline, source: Any, mesh: Mesh | None = None, buckets: Buckets | None = None
) -> Stream:
    """Batches of a source: the rows that this process's devices of the mesh hold; without a mesh, all of them.

    Args:
        buckets: the sizes of the pictures; None: each is cut to its central square.

    Raises:
        UserError: processes of one mesh whose data differ.
    """
    batch = NamedSharding(mesh, sharding.BATCH) if mesh else None
    sizes = set(buckets.plan.batch_sizes) if buckets else {batching.global_batch_size}
    stream = make_stream(
        source,
        **vars(batching),
        tokenize=pipeline.tokens,
        rows={size: sharding.rows_of_process(batch, size) for size in sizes} if batch else None,
        buckets=buckets,
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
        batch_size=config.train.global_batch_size // parts_of_sizes(config),
        seed=config.seed,
        max_bad_fraction=data.max_bad_fraction,
        equal_tokens=data.equal_tokens,
    )


def parts_of_sizes(config: ConfigDict) -> int:
    """How many parts of a batch may each have another size: 1 where all of a batch have one."""
    return config.train.accumulate_steps if config.data.mixed_sizes else 1


def parts_of_a_size(config: ConfigDict) -> int:
    """In how many parts is computed what the data give of one size."""
    return config.train.accumulate_steps // parts_of_sizes(config)


def held_out_buckets(config: ConfigDict, source: Any, held_out: Any) -> Buckets | None:
    """Validation's batches of each of a training's sizes, so that no others are compiled for, and losses are of them.

    None where all pictures are brought to one square.

    Raises:
        UserError: no held-out picture fits any of the sizes.
    """
    if not (trained := open_buckets(config, source)):
        return None
    sizes = in_parts(trained, parts_of_a_size(config))
    return once_each(held_out, sizes, limits_of(config.data), config.validation.num_examples)[0]


def in_parts(buckets: Buckets, parts: int) -> dict[Size, int]:
    """The sizes, and of each as many examples as the devices hold of it in training."""
    return {size: count // parts for size, count in buckets.batch_sizes.items()}


def check_batches(config: ConfigDict, source: Any, mesh: Mesh | None, buckets: Buckets | None) -> None:
    """Raises a UserError where records take no random crops, or where batches of each size do not divide.

    That of `train.global_batch_size` has been looked at with the mesh.
    """
    if config.data.random_crop:
        check_crops(source)
    if mesh is None or buckets is None or not config.data.equal_tokens:
        return
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * parts_of_a_size(config)
    if any(size % parts for size in buckets.plan.batch_sizes):
        among = "mesh.data x mesh.fsdp" + " x train.accumulate_steps" * (not config.data.mixed_sizes)
        raise UserError(
            f"config: data.equal_tokens = {config.data.equal_tokens} must be a multiple of {among} = {parts}, among "
            "which each batch is divided"
        )


def limits_of(data: ConfigDict) -> Limits:
    """The limits of the section `data` of a config."""
    return Limits(data.max_aspect, data.max_enlargement or float("inf"))


def latent_statistics(batching: Batching, pipeline: Pipeline, vae_params: PyTree, source: Any) -> Statistics:
    """The mean and the standard deviation of each channel of the latents, over 256 of the data's pictures.

    They are the first of the training's order, again and again where there are fewer. Of a cache, those by which its
    autoencoder was standardised.

    Raises:
        UserError: it was not.
    """
    if cache := getattr(source, "cache", None):
        return cache.statistics(source.label, f"model.{pipeline.family.autoencoder}.scaling_factor")
    sampled = replace(batching, global_batch_size=8, random_flip=False, random_crop=False)
    batches = stream_of(sampled, pipeline, source).iterator(0)
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
