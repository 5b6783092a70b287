"""`offsetjax train --check`: all that can be looked at before a training, in seconds, with nothing written.

What is wrong is collected, so that one look finds all of it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from offsetjax.config import Stage, stages_of
from offsetjax.data.buckets import square
from offsetjax.data.record import Latents
from offsetjax.data.sizes import Buckets
from offsetjax.data.source import Source, open_data, seen
from offsetjax.errors import UserError
from offsetjax.files import check_folder
from offsetjax.models.frozen import read_tokenizers
from offsetjax.models.pipeline import Pipeline, build, for_training
from offsetjax.models.task import task_of
from offsetjax.models.weights import abstract_trained
from offsetjax.training.setup import for_stages, mesh_of_stages, reopened, settled
from offsetjax.training.step import make_update
from offsetjax.training.streams import check_batches, held_out_buckets, open_buckets, open_sources
from offsetjax.training.summary import GIB, advice, free_bytes, state_bytes, summary
from offsetjax.training.validation import check_apart

_RECORDS = 16  # that are decoded, evenly over the data

Result = TypeVar("Result")


@dataclass
class _Found:
    """What was found: what stops a training, and what a user should know."""

    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def of(self, look: Callable[[], Result]) -> Result | None:
        """What a look gives; None where it finds a mistake, which is noted."""
        try:
            return look()
        except UserError as error:
            self.wrong.append(str(error))
            return None

    def of_stages(
        self, config: ConfigDict, sources: Sequence[Source], look: Callable[[ConfigDict, Source], None]
    ) -> None:
        """Looks at the config and the data of each stage."""
        for stage, source in zip(stages_of(config), sources, strict=True):
            self.of(partial(_named, stage, partial(look, stage.config(config), source)))


def check(config: ConfigDict, workdir: epath.PathLike) -> tuple[list[str], list[str], list[str]]:
    """Checks data, model, mesh, prompts, disk and work directory.

    Returns:
        What stops the training; what should be known; and, where nothing stops it, what it would do.
    """
    found, folder = _Found(), epath.Path(workdir)
    found.of(lambda: check_folder("train", folder))
    sources = found.of(lambda: open_sources(config))
    if sources:
        found.of_stages(config, sources, partial(_look_at_data, found))
    mesh = found.of(lambda: mesh_of_stages(config))
    ready = found.of(lambda: _ready(config, folder, sources)) if sources else None
    if sources and mesh and ready:
        resolved, pipeline = ready
        found.notes += _long_prompts(resolved, pipeline)
        found.of(lambda: _check_room(resolved, pipeline, folder))
        shown: list[tuple[int, Buckets | None]] = []
        found.of_stages(resolved, sources, partial(_look_at_batches, found, pipeline, mesh, shown))
        if not found.wrong:
            found.notes += advice(resolved, pipeline)
            lines = [*summary(resolved, pipeline, shown, mesh, workdir)]
            for stage, (_, buckets) in zip(stages_of(resolved), shown, strict=True):
                found.notes += buckets.notes if buckets else ()
                of_stage = [f"sizes of stage {stage.number}:"] * (stage.count > 1)
                lines += [*of_stage, *buckets.describe()] if buckets else ()
            return [], found.notes, lines
    return found.wrong, found.notes, []


def _named(stage: Stage, look: Callable[[], None]) -> None:
    with stage.named():
        look()


def _look_at_data(found: _Found, config: ConfigDict, source: Source) -> None:
    data = config.data
    _look_at_records(found, source, data.resolution, data.max_bad_fraction)
    if config.validation.every_steps:
        check_apart(source, open_data(data, config.validation.split))


def _look_at_batches(
    found: _Found,
    pipeline: Pipeline,
    mesh: Mesh,
    shown: list[tuple[int, Buckets | None]],
    config: ConfigDict,
    source: Source,
) -> None:
    """Of a stage: its kernels, its batches, and its held-out pictures; `shown` gets what a summary says of its data."""
    if task_of(config).denoises:
        for_training(pipeline, config.data.resolution, mesh.devices.flat[0].platform, mesh.shape["fsdp"])
    buckets = open_buckets(config, source)
    shown.append((len(source), buckets))
    check_batches(config, source, mesh, buckets)
    if config.validation.every_steps and buckets:
        held_out = held_out_buckets(config, source, open_data(config.data, config.validation.split))
        found.notes += held_out.notes if held_out else ()


def _ready(config: ConfigDict, folder: epath.Path, sources: Sequence[Source]) -> tuple[ConfigDict, Pipeline]:
    """The config as the run would have it, and its parts."""
    if (folder / "config.json").exists():
        config = reopened(config, folder)
        for_stages(config, sources, open_buckets)
        return config, build(config, read_tokenizers(folder / "frozen", build(config).family))
    config, tokenizers = settled(config, folder, *sources)
    return config, build(config, tokenizers)


def _look_at_records(found: _Found, source: Source, resolution: int, max_bad_fraction: float) -> None:
    """Decodes some; where training may leave some out, one that cannot be read is a note, unless all are such."""
    looked = _Found()
    places = np.unique(np.linspace(0, len(source) - 1, _RECORDS, dtype=int)).tolist()
    for index in places:
        looked.of(partial(_see, source, index, resolution))
    stops = not max_bad_fraction or len(looked.wrong) == len(places)
    (found.wrong if stops else found.notes).extend(looked.wrong[:1])


def _see(source: Source, index: int, resolution: int) -> None:
    record = source[index]
    size = record.size if isinstance(record, Latents) else None
    if size is None or size.pixels:  # of a cache of several sizes, one that fits none has no latents
        seen(source, index, record, size or square(resolution))


def _long_prompts(config: ConfigDict, pipeline: Pipeline) -> Iterator[str]:
    """The prompts that the text encoders do not read to their end."""
    if not task_of(config).denoises:
        return
    named: Sequence[tuple[str, Sequence[str]]] = (
        ("sample.prompts", config.sample.prompts if config.sample.every_steps else ()),
        ("sample.negative_prompt", (config.sample.negative_prompt,)),
        ("probe.prompts", config.probe.prompts if config.probe.every_steps else ()),
    )
    for name, prompts in named:
        for prompt in prompts:
            tokens = pipeline.tokens(prompt)
            if tokens.num_tokens > tokens.limit:
                yield f"{name}: {prompt[:40]!r}… has {tokens.num_tokens} tokens; the model reads {tokens.limit} of them"


def _check_room(config: ConfigDict, pipeline: Pipeline, folder: epath.Path) -> None:
    """Raises a UserError where the disk cannot hold the checkpoints: those that are kept, and the one being written."""
    free, update = free_bytes(folder), make_update(config.optimizer, config.train, config.model)
    needed = (config.checkpoint.max_to_keep + 1) * state_bytes(update, abstract_trained(pipeline, config.lora))
    if free is not None and not (folder / "checkpoints").exists() and free < needed:
        raise UserError(
            f"train: {folder} has room for {free / GIB:.2f} GiB, where {config.checkpoint.max_to_keep} checkpoints, "
            f"and the one being written, take {needed / GIB:.2f} GiB; lower checkpoint.max_to_keep, or give another "
            "--workdir"
        )
