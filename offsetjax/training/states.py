"""The state that a run starts from: its newest checkpoint's, or the one before the first step."""

import logging
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath
from jaxtyping import PyTree
from orbax.checkpoint import CheckpointManager

from offsetjax.config import stages_of
from offsetjax.config.stages import stage_at
from offsetjax.data.stream import Stream, check_fingerprint
from offsetjax.errors import UserError
from offsetjax.models.weights import abstract_trained, initial_trained
from offsetjax.parallel import sharding
from offsetjax.storage import checkpoint, record
from offsetjax.training import rollback
from offsetjax.training.rollback import RollBack
from offsetjax.training.setup import Run
from offsetjax.training.step import TrainState, init_state, make_update
from offsetjax.training.summary import advice, summary

_log = logging.getLogger("offsetjax")
SKIPPED = "skipped_in_a_row"  # in a checkpoint, of the steps up to it


def first_state(
    run: Run,
    manager: CheckpointManager,
    stream: Stream,
    rolled_back: RollBack | None = None,
    others: Sequence[Stream] = (),
) -> tuple[TrainState, PyTree, int]:
    """The newest checkpoint's state, or the one before the first step; its shardings; and how many steps in a row were
    skipped before it.

    Args:
        stream: the batches, of the first stage where there are several.
        rolled_back: where the run went back to, if it did.
        others: the batches of the other stages.
    """
    config, pipeline = run.config, run.pipeline
    stages, streams = stages_of(config), (stream, *others)
    update = make_update(config.optimizer, config.train, config.model)
    like = jax.eval_shape(lambda params: init_state(params, update), abstract_trained(pipeline, config.lora))
    shardings = sharding.shardings(run.mesh, pipeline.sharding, like)
    for line in summary(
        config, pipeline, [(len(each.source), each.buckets) for each in streams], run.mesh, run.workdir
    ):
        _log.info("%s", line)
    for line in advice(config, pipeline):
        _log.warning("%s", line)
    if manager.all_steps():

        def check(step: int, data: dict[str, Any]) -> None:
            check_fingerprint(data["fingerprint"], streams[stage_at(stages, step).number - 1].fingerprint())
            (rolled_back or RollBack()).check(step, data)

        state, data = checkpoint.restore_newest(manager, checkpoint.abstract(like, shardings), check)
        _log.info("resuming %s at step %d", run.workdir, int(state.step))
        return state, shardings, int(data.get(SKIPPED, 0))
    refuse_to_begin_again(run.workdir, config.checkpoint.every_steps)
    checkpoint.check_room(run.workdir, checkpoint.size_of(like))
    for row in sharding.placed(run.mesh, pipeline.sharding, like.params):
        held = f"{row.elements_per_device / 1e6:.2f} of {row.elements / 1e6:.2f} M on a device"
        _log.info("  %d arrays of %s: %s", row.arrays, row.pattern, held)
        if row.undivided:
            whole = f"{len(row.undivided)} large ones whole: {row.undivided[0]}, …"
            _log.warning("  mesh.fsdp = %d divides no axis of %s", run.mesh.shape["fsdp"], whole)
    for stage in stages:
        warmup, steps = stage.config(config).optimizer.warmup_steps, len(stage.steps)
        if warmup > steps:
            of_stage = f" of stage {stage.number}" * (stage.count > 1)
            _log.warning("optimizer.warmup_steps = %d is cut to train.steps = %d%s", warmup, steps, of_stage)
    params = initial_trained(pipeline, config.model, config.lora, config.seed, shardings.params)
    # Donated: the first state holds the parameters once, whatever their size.
    begin = jax.jit(lambda params: init_state(params, update), out_shardings=shardings, donate_argnums=0)
    return begin(params), shardings, 0


def refuse_to_begin_again(workdir: epath.Path, every_steps: int) -> None:
    """Refuses to begin at step 0 what has saved steps that are not there any more.

    Args:
        every_steps: a checkpoint was written, where no note says whether; the first may have been on its way.

    Raises:
        UserError: its log, or its record of saves, says so.
    """
    saved, logged = record.newest_saved(workdir), record.steps_made(workdir)
    if saved is None:  # as of runs of before it was noted: the log says what must have been saved
        saved = logged if logged >= 2 * every_steps else 0
    if made := saved or rollback.read(workdir).to:
        raise UserError(
            f"checkpoint: {workdir}/checkpoints has no step, but {workdir} was trained to step {made}; restore it from "
            "a copy, or give another --workdir"
        )
    if logged:
        _log.warning("%s has no checkpoint yet: its %d steps so far are made again", workdir, logged)
