"""A run, begun or reopened: its resolved config, mesh, parts and first state.

A work directory is complete once it has `config.json`; until then a start begins anew. The parts that training does
not change are kept in `frozen/`, so that nothing outside the work directory is needed to resume, sample or export.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from offsetjax.config import (
    Stage,
    assign,
    config_at,
    default_config,
    flatten,
    is_explicit,
    may_change_on_resume,
    stages_of,
    validate,
)
from offsetjax.config.registries import OPTIMIZERS
from offsetjax.config.stages import check_past
from offsetjax.data.source import captions
from offsetjax.diffusion.calibration import FILLED
from offsetjax.errors import UserError
from offsetjax.formats.names import flax_tensors, torch_tensors
from offsetjax.formats.tensors import Tensor
from offsetjax.models.family import family_of
from offsetjax.models.frozen import load_frozen, read_tokenizers, write_frozen
from offsetjax.models.pipeline import Pipeline, build
from offsetjax.models.resolve import adopt_lora, calibrated, check_resolution, resolution_unit, resolve
from offsetjax.models.task import task_of
from offsetjax.models.trained import read_config, write_config
from offsetjax.models.weights import (
    abstract_params,
    carried_tensors,
    check_initial,
    initial_tensors,
    left_out_tensors,
    new_tokenizers,
    on_host,
    pretrained_tokenizers,
)
from offsetjax.parallel import sharding
from offsetjax.parallel.processes import barrier
from offsetjax.sampling.size import check_drawn_size
from offsetjax.storage import digests, record
from offsetjax.storage.lock import WorkdirLock
from offsetjax.training.schedules import learning_rate
from offsetjax.training.streams import batching_of, check_cache, latent_statistics, open_buckets

_log = logging.getLogger("offsetjax")


@dataclass(frozen=True)
class Run:
    """What stays the same from the first step to the last, or, of a stage, for its steps.

    Attributes:
        stage: whose config and pipeline these are; None: those of the whole training.
    """

    config: ConfigDict
    workdir: epath.Path
    mesh: Mesh
    pipeline: Pipeline
    frozen: PyTree
    stage: Stage | None = None

    @property
    def steps(self) -> range:
        """As the numbers of updates before each."""
        return self.stage.steps if self.stage else range(self.config.train.steps)

    def of_stage(self, stage: Stage) -> "Run":
        """A stage of this run, whose config is that of all of them."""
        if (config := stage.config(self.config)) is self.config:
            return replace(self, stage=stage)
        return replace(self, config=config, pipeline=build(config, self.pipeline.tokenizers), stage=stage)

    @property
    def step_frozen(self) -> PyTree:
        """The frozen parts that a step and a validation compute with; drawing takes all.

        Where the latents are cached, there is no autoencoder among them.
        """
        unused = self.pipeline.family.autoencoder if self.config.data.cached_latents else None
        return {part: params for part, params in self.frozen.items() if part != unused}


def open_run(
    config: ConfigDict, workdir: epath.Path, source: Any, lock: WorkdirLock | None = None, others: Sequence[Any] = ()
) -> Run:
    """Begins the run of `workdir`, or reopens it.

    Args:
        source: the data, of the first stage where there are several.
        lock: of the work directory, which is acquired before anything is written.
        others: the data of the other stages.

    Raises:
        UserError: the config contradicts the checkpoint that it starts from, or the run that it resumes; or another
            training holds the lock.
    """
    mesh, sources = mesh_of_stages(config), (source, *others)
    is_new = not (workdir / "config.json").exists()
    barrier("the work directory is looked at")  # the first process must not write before the others have looked
    config = _begin(config, workdir, sources, lock) if is_new else _reopen(config, workdir, lock)
    digests.check(workdir / "frozen")
    pipeline = build(config, read_tokenizers(workdir / "frozen", family_of(config.model)))
    frozen = load_frozen(workdir / "frozen", pipeline, partial(sharding.shardings, mesh, pipeline.sharding))
    if not is_new:  # the data may be others than those that the run was begun with
        vae = frozen.get(pipeline.family.autoencoder)
        for_stages(config, sources, lambda each, source: _check_resumed(each, source, pipeline, vae))
    return Run(config, workdir, mesh, pipeline, frozen)


def _check_resumed(config: ConfigDict, source: Any, pipeline: Pipeline, vae_params: PyTree) -> None:
    check_resolution(config)  # of a stage that was added
    check_cache(config, source, pipeline, vae_params)


def mesh_of_stages(config: ConfigDict) -> Mesh:
    """The mesh of a config, among whose devices the batches of all of its stages divide.

    Raises:
        UserError: they do not.
    """
    meshes = []
    for stage in stages_of(config):
        with stage.named():
            meshes.append(sharding.make_mesh(config.mesh, stage.config(config).train))
    return meshes[0]


def for_stages(config: ConfigDict, sources: Sequence[Any], look: Callable[[ConfigDict, Any], object]) -> None:
    """Looks at the config and the data of each stage; a UserError says of which it is."""
    for stage, source in zip(stages_of(config), sources, strict=True):
        with stage.named():
            look(stage.config(config), source)


def _begin(config: ConfigDict, workdir: epath.Path, sources: Sequence[Any], lock: WorkdirLock | None) -> ConfigDict:
    """Writes what a work directory has from the start, once all that can be wrong has been looked at."""
    config, tokenizers = settled(config, workdir, *sources)
    pipeline = build(config, tokenizers)
    tensors = {part: initial_tensors(config.model, config.seed, part, pipeline.parts[part]) for part in pipeline.frozen}
    autoencoder = pipeline.family.autoencoder
    if task_of(config).denoises and pipeline.autoencoder.scaling_factor == 0:
        vae = _vae_params(tensors[autoencoder], pipeline)
        mean, std = latent_statistics(batching_of(config_at(config, 1)), pipeline, vae, sources[0])
        tensors[autoencoder] = torch_tensors(pipeline.autoencoder.standardised(vae, mean, std))
        assign(config, f"model.{autoencoder}.scaling_factor", 1.0, explicit=False)
        pipeline = build(config, tokenizers)
        _log.info("%s: latents standardised; mean %s, standard deviation %s", autoencoder, mean.round(3), std.round(3))
    if config.data.cached_latents:
        vae = _vae_params(tensors[autoencoder], pipeline)
        for_stages(config, sources, lambda each, source: check_cache(each, source, pipeline, vae))
    if left_out := left_out_tensors(config.model):
        _log.info("%s: left out %d tensors of its training: %s, …", config.model.pretrained, len(left_out), left_out[0])
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        if lock:
            lock.acquire()
        carried = carried_tensors(config.model) if task_of(config).denoises else {}
        write_frozen(workdir / "frozen", pipeline, tensors, carried)
        write_config(workdir, config)
        record.note_begun(workdir)
    barrier("the work directory is written")
    return config


def settled(config: ConfigDict, workdir: epath.Path, source: Any, *others: Any) -> tuple[ConfigDict, dict[str, Any]]:
    """The config with what its model, calibration and LoRA say, and the tokenizers; nothing is written.

    Args:
        source: the data, of the first stage where there are several, and of the others.

    Raises:
        UserError: they contradict it or one another, or cannot be read.
    """
    if record.steps_made(workdir) or record.has_saved(workdir):
        raise UserError(
            f"workdir: {workdir} has been trained but has no config.json; restore it, or give another --workdir"
        )
    config = resolve(config)
    config = calibrated(config)
    adopt_lora(config)
    validate(config)  # what was read and filled in may not go with what was set
    for_stages(config, (source, *others), _check_sizes)
    if task_of(config).denoises:
        check_drawn_size(config.sample, resolution_unit(config))
    tokenizers = _tokenizers(config, source)
    check_initial(build(config, tokenizers), config.model, config.lora)
    return config, tokenizers


def _check_sizes(config: ConfigDict, source: Any) -> None:
    check_resolution(config)
    open_buckets(config, source)  # which cannot be changed once the run has begun


def _vae_params(tensors: Mapping[str, Tensor], pipeline: Pipeline) -> PyTree:
    return on_host(flax_tensors(tensors, abstract_params(pipeline.autoencoder), pipeline.family.autoencoder))


def _reopen(config: ConfigDict, workdir: epath.Path, lock: WorkdirLock | None) -> ConfigDict:
    config = reopened(config, workdir)
    if jax.process_index() == 0:
        if lock:
            lock.acquire()
        write_config(workdir, config)
    return config


def reopened(config: ConfigDict, workdir: epath.Path) -> ConfigDict:
    """The config with which `config` resumes a work directory; nothing is written.

    Raises:
        UserError: it contradicts what the run was begun with.
    """
    stored = read_config(workdir)
    is_gone = not epath.Path(config.model.pretrained or ".").exists()
    is_uncalibrated = not epath.Path(config.noise.calibration or ".").exists()
    config = config if is_gone else resolve(config)
    config = config if is_uncalibrated else _refilled(config, stored)
    is_lora_gone = is_gone or not epath.Path(config.lora.pretrained or ".").exists()
    if not is_lora_gone:
        adopt_lora(config)
    given, defaults = dict(flatten(config)), dict(flatten(default_config()))
    check_past(dict(flatten(stored)), given, record.newest_saved(workdir) or 0)
    scale = f"model.{family_of(stored.model).autoencoder}.scaling_factor"
    if given.get(scale) == 0:  # the latents were standardised when the run began
        given[scale] = dict(flatten(stored))[scale]
    for path, value in flatten(stored):
        # Where model.pretrained, lora.pretrained or noise.calibration is gone, what it said cannot be read again.
        section = path.split(".")[0]
        was_read = (is_gone and section in ("model", "schedule")) or (is_lora_gone and section == "lora")
        is_left_open = given[path] == defaults[path] and not is_explicit(config, path)
        was_read = (was_read or (is_uncalibrated and path in FILLED)) and is_left_open
        if given[path] != value and not may_change_on_resume(path) and not was_read:
            raise UserError(
                f"config: {path} = {given[path]!r}, but {workdir} was begun with {value!r}; "
                "set it back, or give another --workdir"
            )
    if stored.noise.anneal and config.train.steps > stored.train.steps:
        _log.warning(
            "noise.anneal: train.steps was %d and is %d, so that the noise of the training comes back, to become plain "
            "over its new end",
            stored.train.steps,
            config.train.steps,
        )
    _warn_of_another_rate(stored, config, record.newest_saved(workdir) or 0)
    # Before its first checkpoint a run reads its model again, from where that is now.
    for path, value in flatten(config):
        if may_change_on_resume(path):
            assign(stored, path, value, explicit=is_explicit(config, path))
    if task_of(stored).denoises:
        check_drawn_size(stored.sample, resolution_unit(stored))
    validate(stored)  # where model.pretrained is gone, these have not been compared with its schedule yet
    return stored


def _warn_of_another_rate(stored: ConfigDict, config: ConfigDict, step: int) -> None:
    """Says what another end of the training makes of the learning rate, which falls towards it."""
    is_answered = config.optimizer.decay_from not in (0, stored.optimizer.decay_from)
    if not step or is_answered or config.train.stages or not OPTIMIZERS.is_own(config.optimizer.name):
        return
    then, now = (learning_rate(each.optimizer, each.train.steps) for each in (stored, config))
    before, after = float(then(min(step, stored.train.steps))), float(now(step))
    if not math.isclose(before, after, rel_tol=0.01):
        _log.warning(
            "the learning rate was %.2g at step %d of %d, and is %.2g at step %d of %d; with optimizer.decay_from=%d "
            "it would begin anew there, with its warm-up",
            *(before, step, stored.train.steps),
            *(after, step, config.train.steps, step),
        )


def _refilled(config: ConfigDict, stored: ConfigDict) -> ConfigDict:
    """The config with what its calibration fills in for the stored model and schedule, which a gone one had decided."""
    config = config.copy_and_resolve_references()
    like = stored.copy_and_resolve_references()
    like.noise = config.noise
    config.noise = calibrated(like).noise
    return config


def _tokenizers(config: ConfigDict, source: Any) -> dict[str, Any]:
    if not task_of(config).denoises:
        return {}
    if (pretrained := pretrained_tokenizers(config.model)) is not None:
        return pretrained
    return new_tokenizers(config.model, captions(source))
