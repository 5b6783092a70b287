"""`offsetjax data encode`: the latents of a data set's pictures, encoded once, for `data.cached_latents`.

Each process encodes whole shards of its own, on all of its devices, in float32 (of which TPUs and GPUs multiply less by
default); `data/cache.py` says what is written.
"""

import errno
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PyTree, UInt8
from ml_collections import ConfigDict

from offsetjax.config.checks import validate
from offsetjax.data import cache as caches
from offsetjax.data.buckets import Size, assign, square
from offsetjax.data.cache import Cache, Shard
from offsetjax.data.sizes import measured
from offsetjax.data.source import Source, describe, open_data, seen, split_names
from offsetjax.errors import UserError
from offsetjax.models.encode import encode_moments, encoder_checksum
from offsetjax.models.pipeline import Pipeline, build
from offsetjax.models.resolve import check_resolution, resolve
from offsetjax.models.task import task_of
from offsetjax.models.weights import initial_params
from offsetjax.parallel.processes import barrier
from offsetjax.progress import tracked
from offsetjax.training.streams import Statistics, batching_of, check_cache, latent_statistics, limits_of, open_buckets

_log = logging.getLogger("offsetjax")
_PICTURES_A_DEVICE = 8  # at a time
_SHOWN_SECONDS = 60  # within which a network disk shows all processes what one has written

# Pictures → the moments of their v views, as a cache has them.
Encode = Callable[[UInt8[np.ndarray, "b H W 3"]], Float[Array, "b v 2 c h w"]]


def encode_data(config: ConfigDict, out: epath.PathLike, shard_size: int = caches.SHARD_SIZE) -> Cache:
    """Writes a cache of the pictures of a config to `out`, for `data.path`, or completes one that is unfinished.

    Where it is finished, nothing is written. The splits that `data.split` and `validation.split` are of are encoded
    whole.

    Raises:
        UserError: a mistake in the config or the data, a picture that cannot be decoded, or what is in `out`.
    """
    if not task_of(config).denoises:
        raise UserError(
            f"data: task = {config.task!r} trains what encodes; give `data encode` the config of the diffusion training"
        )
    if config.data.cached_latents:
        raise UserError("data: `data encode` reads pictures: give their data.path, and data.cached_latents=False")
    if config.data.mix:
        raise UserError("data: `data encode` makes the latents of one data set; leave out data.mix, give data.path")
    if config.data.random_crop:
        raise UserError("data: `data encode` makes latents of central crops; leave out data.random_crop")
    of_training = open_data(config.data)
    config, pipeline, params, statistics = open_vae(config, of_training)
    sources = _whole_splits(config.data, config.validation.split)
    buckets = open_buckets(config, of_training)  # a training's; what else its splits hold goes to the same sizes
    sizes = buckets.sizes if buckets else ()
    for line in (*buckets.describe(), *buckets.notes) if buckets else ():
        _log.info("  %s", line)
    cache = _describe(config.data, pipeline.autoencoder, params, statistics, sources, sizes)
    whole = {split: measured(source) for split, source in sources.items()} if sizes else {}
    placed = {split: assign(each[:, 0], each[:, 1], sizes, limits_of(config.data)) for split, each in whole.items()}
    finished = caches.is_finished(out, cache)
    shards = caches.missing_shards(out, cache, shard_size)
    barrier("the cache is looked at")  # the first process must not write before the others have looked
    is_first = jax.process_index() == 0
    if is_first:
        caches.begin(out, cache, whole)
    barrier("the cache is begun")
    if not _is_shown(lambda: caches.is_begun(out)):
        raise UserError(
            f"data: process {jax.process_index()} does not see the cache that process 0 has begun in {out}; give as "
            "--out a place that all processes share: gs://… or a shared disk"
        )
    if finished:
        if is_first:
            _log.info("%s: encoded already; give it as data.path, with data.cached_latents=True", out)
        return cache
    encode = _jit_encode(pipeline.autoencoder, params, cache.random_flip)
    own = shards[jax.process_index() :: jax.process_count()]
    for number, shard in enumerate(own, start=1):
        of_split = placed.get(shard.split)
        size_of = of_split.size_of if of_split else partial(_square, cache.resolution)
        records = _records(sources[shard.split], shard, size_of, encode, cache)
        description = f"Encoding pictures, part {number} of {len(own)}"
        shard.write(tracked(records, description, shard.last - shard.first, is_first), cache)
    barrier("the latents are written")
    if is_first:
        if not _is_shown(lambda: not caches.missing_shards(out, cache, shard_size)):
            # No mistake of the user's: another start may find it.
            raise OSError(errno.EIO, "process 0 does not see all that the other processes have written", str(out))
        caches.finish(out, cache, shard_size)
        counts = ", ".join(f"{count} of {split}" for split, count in cache.num_examples.items())
        _log.info("%s: %s encoded; give it as data.path, with data.cached_latents=True", out, counts)
    return cache


def open_vae(config: ConfigDict, source: Source) -> tuple[ConfigDict, Pipeline, PyTree, Statistics | None]:
    """What a run begins with: the resolved config, the parts without a tokenizer, and the autoencoder's parameters.

    Returns:
        These, and the mean and deviation of the latents by which the autoencoder was standardised, if it was.
    """
    config = resolve(config)
    validate(config)  # what was read may not go with what was set
    check_resolution(config)
    pipeline, statistics = build(config), None
    params = jax.device_get(
        initial_params(config.model, config.seed, pipeline.family.autoencoder, pipeline.autoencoder)
    )
    if pipeline.autoencoder.scaling_factor == 0:
        statistics = latent_statistics(batching_of(config), pipeline, params, source)
        params = pipeline.autoencoder.standardised(params, *statistics)
        config.model[pipeline.family.autoencoder].scaling_factor = 1.0
        pipeline = build(config)
    check_cache(config, source, pipeline, params)
    return config, pipeline, params, statistics


def _is_shown(is_there: Callable[[], bool]) -> bool:
    """Whether this process sees, now or after a while, what another has written."""
    end = time.monotonic() + _SHOWN_SECONDS
    while not (is_shown := is_there()) and time.monotonic() < end:
        time.sleep(1)
    return is_shown


def _whole_splits(data: ConfigDict, validation_split: str) -> dict[str, Source]:
    """The splits, by their names, that a training takes pictures from: `train` for `train[:95%]`."""
    names = split_names("+".join(spec for spec in (data.split, validation_split) if spec))
    if "all" in names:  # TFDS's name for the sum of them, which no data set can have for one of its own
        raise UserError("data: `data encode` needs the splits that 'all' stands for, such as 'train+test'")
    return {name: open_data(data, name) for name in sorted(names)}


def _describe(
    data: ConfigDict,
    vae: Any,
    params: PyTree,
    statistics: Statistics | None,
    sources: dict[str, Source],
    sizes: Sequence[Size],
) -> Cache:
    mean, std = statistics or (np.array([]), np.array([]))
    side = data.resolution // vae.downscale
    return Cache(
        encoder=encoder_checksum(vae, params),
        scaling_factor=vae.scaling_factor,
        latent_mean=mean.tolist(),
        latent_std=std.tolist(),
        latent_shape=(vae.latent_channels,) if sizes else (vae.latent_channels, side, side),
        resolution=data.resolution,
        random_flip=data.random_flip,
        source=data.path,
        num_examples={split: len(source) for split, source in sources.items()},
        num_bytes={split: int(source.fingerprint().get("num_bytes", 0)) for split, source in sources.items()},
        sizes=[str(size) for size in sizes],
        max_aspect=data.max_aspect if sizes else 0.0,
        max_enlargement=data.max_enlargement if sizes else 0.0,
    )


def _square(resolution: int, index: int) -> Size:
    return square(resolution)


def _jit_encode(vae: Any, params: PyTree, random_flip: bool) -> Encode:
    """Encodes on all devices of this process, a few pictures at a time on each."""
    mesh = Mesh(np.array(jax.local_devices()), ("data",))

    def encode(params: PyTree, pixels: UInt8[Array, "b H W 3"]) -> Float[Array, "b v 2 c h w"]:
        views = jnp.stack([pixels, pixels[:, :, ::-1]] if random_flip else [pixels], axis=1)
        moments = jnp.stack(encode_moments(vae, params, views.reshape(-1, *pixels.shape[1:])), axis=1)
        return moments.reshape(*views.shape[:2], *moments.shape[1:]).astype(jnp.float16)

    on_devices = jax.jit(
        jax.shard_map(encode, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=False)
    )
    params = jax.device_put(params, NamedSharding(mesh, P()))
    return partial(on_devices, params)


def _records(
    source: Source, shard: Shard, size_of: Callable[[int], Size | None], encode: Encode, cache: Cache
) -> Iterator[dict[str, Any]]:
    """The records of a shard in their order: a batch for the devices at a time or, where it has several sizes, at its
    end, for a batch has one."""
    by_size: dict[Size | None, list[int]] = {}
    for index in range(shard.first, shard.last):
        by_size.setdefault(size_of(index), []).append(index)
    if len(by_size) == 1 and None not in by_size:
        [(size, indices)] = by_size.items()
        assert size is not None
        return _of_size(source, indices, size, encode, cache)
    found: dict[int, dict[str, Any]] = {index: _left_out(source, index, cache) for index in by_size.pop(None, [])}
    return _sorted(source, by_size, encode, cache, found)


def _sorted(
    source: Source, by_size: Mapping[Any, list[int]], encode: Encode, cache: Cache, found: dict[int, dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    for size, indices in by_size.items():
        found |= zip(indices, _of_size(source, indices, size, encode, cache), strict=True)
    yield from (found.pop(index) for index in sorted(found))


def _of_size(
    source: Source, numbers: Sequence[int], size: Size, encode: Encode, cache: Cache
) -> Iterator[dict[str, Any]]:
    """The records of these numbers, which have one size."""
    count = _PICTURES_A_DEVICE * jax.local_device_count()
    # The last picture fills up the last batch: there is one program of a size, of one shape.
    indices = np.pad(np.array(numbers), (0, -len(numbers) % count), mode="edge")
    pictures = grain.MapDataset.source(indices).map(partial(_picture, source, size))
    options = grain.ReadOptions(num_threads=os.cpu_count() or 1, prefetch_buffer_size=2 * count)
    batches = pictures.to_iter_dataset(options).batch(count)
    begun = ((batch, encode(batch["pixels"])) for batch in batches)
    records = (record for batch, moments in _one_ahead(begun) for record in _to_records(batch, moments, source, cache))
    return itertools.islice(records, len(numbers))


def _left_out(source: Source, index: int, cache: Cache) -> dict[str, Any]:
    """A record without latents, of a picture that fits none of the sizes or cannot be read."""
    try:
        about = {"caption": source[index].caption, "name": source[index].name}
    except UserError:
        about = {"caption": "", "name": ""}
    return {**cache.fields(None), "time_ids": np.zeros(6, np.float32), "brightness": np.float32(0), **about}


def _one_ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The items, each once the next is there: the devices encode a batch while the one before is written."""
    return (item for item, _ in itertools.pairwise(itertools.chain(items, (None,))))


def _picture(source: Source, size: Size, index: int) -> dict[str, Any]:
    record = source[index]
    fields = seen(source, index, record, size)
    about = {"caption": record.caption, "name": record.name, "index": index}
    return {**fields, **about, "brightness": np.float32(fields["pixels"].mean() / 255)}


def _to_records(
    batch: dict[str, Any], encoded: Float[Array, "b v 2 c h w"], source: Source, cache: Cache
) -> Iterator[dict[str, Any]]:
    moments = np.asarray(encoded)
    for place, index in enumerate(batch["index"]):
        if not np.isfinite(moments[place]).all():
            raise UserError(
                f"data: {describe(source, index)} has latents that are not finite, or beyond float16; check "
                "model.pretrained"
            )
        about = {name: batch[name][place] for name in ("time_ids", "brightness", "caption", "name")}
        yield {**cache.fields(moments[place]), **about}
