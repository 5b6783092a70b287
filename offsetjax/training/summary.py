"""What a training will do, in a few lines: said at its start, and by `offsetjax train --check` without one."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from offsetjax.config import stages_of
from offsetjax.data.sizes import Buckets
from offsetjax.diffusion.noise import describe
from offsetjax.models.pipeline import Pipeline
from offsetjax.models.task import task_of
from offsetjax.models.weights import abstract_params, abstract_trained
from offsetjax.training.step import Update, init_state, make_update
from offsetjax.training.streams import parts_of_sizes

GIB = 2**30


def summary(
    config: ConfigDict,
    pipeline: Pipeline,
    shown: Sequence[tuple[int, Buckets | None]],
    mesh: Mesh,
    workdir: epath.PathLike,
) -> Iterator[str]:
    """The lines: data, steps, noise, what is trained and what is not, devices, and where things go.

    Args:
        shown: of each stage how many pictures its data have, and their sizes and batches, where there are several.
    """
    sample = config.sample
    for stage, (num_examples, buckets) in zip(stages_of(config), shown, strict=True):
        if stage.count > 1:
            yield str(stage)
        yield from _of_stage(stage.config(config), pipeline, len(stage.steps), num_examples, buckets)
    trained = abstract_trained(pipeline, config.lora)
    rank = f" in adapters of rank {config.lora.rank}" if config.lora.rank else ""
    yield f"trained: {_counted({part: _size(params) for part, params in trained.items()})}{rank}"
    frozen = {part: _size(abstract_params(_bare(pipeline.parts[part]))) for part in pipeline.frozen}
    yield f"frozen: {_counted(frozen)}"
    yield f"devices: {devices_in_words(mesh)}"
    saved = state_bytes(make_update(config.optimizer, config.train, config.model), trained) / GIB
    yield (
        f"checkpoints: {workdir}/checkpoints, every {config.checkpoint.every_steps:,} steps, {saved:.2f} GiB each; the "
        f"newest {config.checkpoint.max_to_keep} are kept"
    )
    if sample.every_steps and sample.prompts:
        grid = len(sample.prompts) * sample.seeds_per_prompt
        yield f"pictures: {workdir}/samples, {grid} every {sample.every_steps:,} steps"


def _of_stage(
    config: ConfigDict, pipeline: Pipeline, steps: int, num_examples: int, buckets: Buckets | None
) -> Iterator[str]:
    """Data, steps and noise of a stage."""
    train = config.train
    kind = "latents" if config.data.cached_latents else "pictures"
    sizes = len(config.data.buckets) or config.data.bucket_count
    of_sizes = f", {sizes} sizes" if config.data.buckets else f", at most {sizes} sizes of its area" if sizes else ""
    about = f"{config.data.resolution} px{of_sizes}"
    where = f"{config.data.path} ({config.data.split})" if config.data.path else f"a mix of {len(config.data.mix)}"
    yield f"data: {num_examples:,} {kind} of {where}, {about}"
    an_epoch = num_examples / train.global_batch_size
    if buckets:
        an_epoch = buckets.batches_an_epoch / parts_of_sizes(config)
    of_sizes = ", each of a size," * config.data.mixed_sizes
    parts = f" in {train.accumulate_steps} parts{of_sizes}" if train.accumulate_steps > 1 else ""
    yield f"steps: {steps:,} of {train.global_batch_size} examples{parts}, {steps / an_epoch:.3g} epochs"
    if task_of(config).denoises:
        _, *size = pipeline.latent_shape(config.data.resolution)
        vanishing = f"; plain over the last {config.noise.anneal:.3g} of the training" * (config.noise.anneal > 0)
        yield f"noise: {describe(pipeline.noising.noise(), config.noise, *size)}{vanishing}"


def advice(config: ConfigDict, pipeline: Pipeline) -> list[str]:
    """What its task has to say of a training, of all of its stages."""
    lines = (line for stage in stages_of(config) for line in task_of(config).advice(pipeline, stage.config(config)))
    return list(dict.fromkeys(lines))


def _bare(model: Any) -> Any:
    """A part without the adapters that are trained beside it."""
    return getattr(model, "model", model)


def _size(tree: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _counted(sizes: Mapping[str, int]) -> str:
    parts = ", ".join(f"{part} {size / 1e6:,.2f} M" for part, size in sizes.items())
    return f"{sum(sizes.values()) / 1e6:,.2f} M parameters ({parts})" if sizes else "nothing"


def devices_in_words(mesh: Mesh) -> str:
    """`8 TPU v5 lite, of 2 processes; mesh data 2, fsdp 4`."""
    devices = mesh.devices.ravel()
    processes = f", of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return f"{len(devices)} {devices[0].device_kind}{processes}; mesh {axes}"


def state_bytes(update: Update, trained: Mapping[str, PyTree]) -> int:
    """The bytes of one checkpoint: parameters, moments and averages."""
    state = jax.eval_shape(lambda params: init_state(params, update), trained)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def free_bytes(folder: epath.PathLike) -> int | None:
    """The room where a folder is, or will be; None on a bucket, which has no end."""
    path = epath.Path(folder)
    if "://" in str(folder):
        return None
    with contextlib.suppress(OSError):
        return shutil.disk_usage(next(each for each in (path, *path.parents) if each.exists())).free
    return None
