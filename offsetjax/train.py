"""The training loop: data → encode → noise → loss → update → checkpoint → export.

`training/setup.py` opens the data and the parts, `training/objective.py` holds encode → noise → loss,
`training/step.py` the update, `storage/` and `exporting/` the rest. What happens between two steps is here.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree
from ml_collections import ConfigDict
from orbax.checkpoint import CheckpointManager

from offsetjax.config import Origin
from offsetjax.data.buckets import Size
from offsetjax.data.devices import on_devices
from offsetjax.data.source import open_data
from offsetjax.data.stream import Stream, check_replaced
from offsetjax.errors import Status, UserError
from offsetjax.files import written_to
from offsetjax.models.pipeline import for_training
from offsetjax.models.task import task_of
from offsetjax.parallel import fsdp, processes, sharding
from offsetjax.parallel.fallback import warn_of_cpu
from offsetjax.parallel.finite import all_finite
from offsetjax.parallel.preemption import Preemption
from offsetjax.parallel.watchdog import Watchdog
from offsetjax.storage import checkpoint
from offsetjax.storage.lock import WorkdirLock
from offsetjax.storage.saving import Saver
from offsetjax.training import rollback
from offsetjax.training.abstract import abstract_batch, model_flops
from offsetjax.training.evaluators import Evaluator, open_evaluators
from offsetjax.training.goodput import Goodput, in_words
from offsetjax.training.guard import Guard
from offsetjax.training.instruments import Instruments, compilation_cache, ideal_of_sizes
from offsetjax.training.metrics import Metrics, StepClock, open_metrics
from offsetjax.training.objective import Objective
from offsetjax.training.programs import SizeLosses, compiled_ahead
from offsetjax.training.rollback import RollBack
from offsetjax.training.setup import Run, open_run
from offsetjax.training.starts import write_start
from offsetjax.training.states import SKIPPED, first_state
from offsetjax.training.step import TrainState, TrainStep, make_gradient, make_train_step, make_update
from offsetjax.training.streams import open_stream
from offsetjax.training.summary import devices_in_words

_log = logging.getLogger("offsetjax")


def train(config: ConfigDict, workdir: epath.PathLike, origin: Origin | None = None) -> None:
    """Trains until `train.steps`, resuming what `workdir` holds.

    Args:
        origin: the config's file and overrides, which are kept with the run.

    Raises:
        UserError: a mistake in the config, the data, the checkpoint or the work directory.
        PreemptedError: a signal came; what was trained is saved.
    """
    lock = WorkdirLock(workdir, lost=lambda why: processes.abort(Status.MISTAKE, f"error: {why}"))
    goodput = Goodput(workdir)
    with (
        Watchdog(config.train.stall_seconds) as watchdog,
        Preemption() as preemption,
        lock,
        written_to(workdir),
        goodput,
    ):
        source = open_data(config.data)
        warn_of_cpu()
        run = open_run(config, epath.Path(workdir), source, lock)
        config = run.config
        watchdog.progressed()
        stream = open_stream(config, run.pipeline, source, run.mesh)
        with compilation_cache(workdir), _open_checkpoints(run) as manager:
            rolled_back = rollback.read(run.workdir)
            state, state_shardings, in_a_row = first_state(run, manager, stream, rolled_back)
            watchdog.progressed()
            if int(state.step) >= config.train.steps:
                _log.info("%s has its %d steps; raise train.steps to continue", workdir, config.train.steps)
                return
            write_start(run.workdir, int(state.step), devices_in_words(run.mesh), origin)
            evaluators = open_evaluators(run, source)
            train_step = jit_train_step(run, state_shardings)
            if _is_ahead(config, stream):
                sizes = stream.batch_sizes
                batches = {
                    size: abstract_batch(run.pipeline, size, sizes[size], config.data.cached_latents) for size in sizes
                }
                with goodput.spent_on("compile"):
                    at_once = config.train.compile_ahead
                    train_step = compiled_ahead(
                        train_step, state, run.step_frozen, batches, at_once, watchdog.progressed
                    )
            loop = partial(_loop, run, train_step, stream, manager, evaluators, preemption, watchdog, goodput)
            bytes_saved = checkpoint.size_of(state)
            goes_back = loop(state, _open_saver(run, manager, lock, bytes_saved), in_a_row, rolled_back)
            if goes_back:
                rollback.write(run.workdir, goes_back)
                goodput.begins_again()
                state, _, in_a_row = first_state(run, manager, stream, goes_back)
                loop(state, _open_saver(run, manager, lock, bytes_saved), in_a_row, goes_back)


def _open_checkpoints(run: Run) -> CheckpointManager:
    kept = run.config.checkpoint
    return checkpoint.open_checkpoints(run.workdir, kept.max_to_keep, kept.keep_every_steps)


def _open_saver(run: Run, manager: CheckpointManager, lock: WorkdirLock, state_bytes: int) -> Saver:
    saved = run.config.checkpoint
    return Saver(manager, lock, state_bytes, every_steps=saved.every_steps, every_minutes=saved.every_minutes)


def jit_train_step(run: Run, state_shardings: PyTree) -> TrainStep:
    """The train step of a run, with its placement."""
    config, platform = run.config, run.mesh.devices.flat[0].platform
    pipeline = for_training(run.pipeline, config.data.resolution, platform, run.mesh.shape["fsdp"])
    return place(task_of(config).objective(pipeline, config), pipeline.dtypes, run, state_shardings)


def place(objective: Objective, dtypes: Mapping[str, Any], run: Run, state_shardings: PyTree) -> TrainStep:
    """The train step of an objective on the run's mesh: the state is donated, batches are split over all devices."""
    config = run.config
    gradient = make_gradient(objective, config.train.accumulate_steps)
    gradient = fsdp.on_mesh(gradient, run.mesh, run.pipeline.sharding, dtypes)
    update = make_update(config.optimizer, config.train, config.model)
    is_finite = partial(all_finite, mesh=run.mesh, rules=run.pipeline.sharding)
    return jax.jit(
        make_train_step(gradient, update, is_finite, saves_memory=run.mesh.devices.flat[0].platform != "cpu"),
        in_shardings=(
            state_shardings,
            sharding.shardings(run.mesh, run.pipeline.sharding, run.step_frozen),
            NamedSharding(run.mesh, sharding.BATCH),
        ),
        out_shardings=(state_shardings, NamedSharding(run.mesh, P())),
        donate_argnums=0,
    )


def _loop(
    run: Run,
    train_step: TrainStep,
    stream: Stream,
    manager: CheckpointManager,
    evaluators: Sequence[Evaluator],
    preemption: Preemption,
    watchdog: Watchdog,
    goodput: Goodput,
    state: TrainState,
    saver: Saver,
    skipped_in_a_row: int,
    rolled_back: RollBack,
) -> RollBack | None:
    """Trains to the end; or gives to where the run has to go back, which it does once."""
    train, frozen = run.config.train, run.step_frozen
    start = int(state.step)

    def size_of(step: int) -> Size:
        return stream.size_of(rolled_back.batch_of(step))

    def count_of(step: int) -> int:
        return stream.batch_sizes[size_of(step)]

    def ideal_of(step: int) -> float:
        return ideal[size_of(step)] if ideal else 0.0

    flops_of = partial(model_flops, run.config, run.pipeline)
    ideal = ideal_of_sizes(flops_of, run.mesh.devices.ravel(), stream.batch_sizes)
    clock = StepClock(start, count_of, goodput, ideal_of)
    size_losses = SizeLosses(size_of) if len(stream.sizes) > 1 else None
    host_batches = rolled_back.batches(stream, start)
    batches = on_devices(host_batches, NamedSharding(run.mesh, sharding.BATCH), stream.whole_size)
    to_compile = 0 if _is_ahead(run.config, stream) else len(stream.sizes)
    instruments = Instruments(run.workdir, train.profile_steps, run.mesh.local_devices, start + 1, to_compile)
    metrics = open_metrics(train.writers, run.workdir, start, train.steps)
    guard = Guard(
        *(stream, rolled_back),
        step=start,
        skipped=int(state.skipped),
        in_a_row=skipped_in_a_row,
        most_in_a_row=train.max_skipped_in_a_row,
        max_spike=train.max_spike,
    )
    unwritten: tuple[int, Any] | None = None
    last: Any = None
    wrong: UserError | None = None
    goodput.resumed(start)
    try:
        if preemption.reached():
            raise preemption.stopped(f"before step {start + 1}")
        if start == 0:
            _evaluate(evaluators, state, 0, metrics, clock, watchdog)
        for step in range(start + 1, train.steps + 1):
            with clock.waiting_for_data():
                batch = next(batches)
            instruments.before(step)
            with clock.waiting(), jax.transfer_guard("disallow"):
                state, step_metrics = train_step(state, frozen, batch)
            instruments.after(step, state)
            if size_losses:
                size_losses.add(step, step_metrics["loss"])
            if last:  # one step ahead of the devices, no more: a stall shows, and to stop is quick
                with clock.waiting():
                    guard.look(step - 1, last)
            last = step_metrics
            watchdog.progressed()
            if unwritten:  # a step late: the devices are at work on the next one while these are fetched
                wrong = _write(metrics, stream, *unwritten, clock, size_losses)
                unwritten = None
            if step % train.log_every_steps == 0 or step in (start + 1, train.steps):
                unwritten = (step, step_metrics)
            # Before the checkpoint: a run that is killed in between looks again when it resumes.
            if due := [evaluator for evaluator in evaluators if evaluator.is_due(step, train.steps)]:
                _evaluate(due, state, step, metrics, clock, watchdog)
            is_preempted, is_due = preemption.reached(), saver.is_due(step)
            if step == train.steps:
                guard.look(step, last)
            is_over = guard.is_over  # by the steps before this one: a run that resumes here finds the same
            if is_over and train.roll_back and not rolled_back:
                saver.finish()
                if goes_back := rollback.before(manager.all_steps(), guard.first_in_a_row, step):
                    _log.warning("%s; the run goes back to step %d, and reads on", guard.found(), goes_back.to)
                    return goes_back
            if is_over:
                wrong = guard.mistake(step)
            if is_preempted or is_due or wrong or step == train.steps:
                if unwritten:  # a save waits for the step anyway, and who resumes after it never sees this step again
                    wrong = _write(metrics, stream, *unwritten, clock, size_losses) or wrong
                    unwritten = None
                guard.look(step, last)
                data = {"fingerprint": stream.fingerprint(), SKIPPED: 0 if is_over else guard.in_a_row}
                with goodput.spent_on("checkpoint"), clock.waiting():
                    saver.save(step, state, data | rolled_back.noted(step))  # where the data are is the step
                    if is_preempted or wrong or step == train.steps:
                        saver.finish()
                goodput.saved(step)
                watchdog.progressed()
            if wrong:
                raise wrong
            if is_preempted and step < train.steps:
                raise preemption.stopped(f"after step {step}")
        _log.info("time: %s", in_words(goodput.totals()))
        if skipped := int(state.skipped):
            _log.warning("%d steps changed nothing; see the warnings at each", skipped)
        if replaced := int(state.replaced):
            _log.warning("%d times a record that cannot be read was left out; see data.max_bad_fraction", replaced)
        if cut := int(state.truncated):
            _log.warning("%d captions were longer than the text encoders read, and cut; see encode.long_captions", cut)
        return None
    finally:
        host_batches.close()
        metrics.close()
        instruments.close()
        goodput.write()


def _is_ahead(config: ConfigDict, stream: Stream) -> bool:
    """Whether the steps for all sizes are compiled before the first."""
    return len(stream.sizes) > 1 and config.train.compile_ahead > 0


def _write(
    metrics: Metrics, stream: Stream, step: int, values: Any, clock: StepClock, size_losses: SizeLosses | None
) -> UserError | None:
    """Logs a step; gives why the run has to end with it, where too many records could not be read."""
    values = {name: value.item() for name, value in jax.device_get(values).items()}
    by_size = size_losses.means(step) if size_losses else {}
    metrics.scalars(step, {**values, **by_size, **clock.lap(step)})
    try:
        check_replaced(stream, int(values["records_replaced"]), stream.examples_before(step))
    except UserError as error:
        return error
    return None


def _evaluate(
    evaluators: Sequence[Evaluator],
    state: TrainState,
    step: int,
    metrics: Metrics,
    clock: StepClock,
    watchdog: Watchdog,
) -> None:
    jax.block_until_ready(state)  # the steps under way are not the evaluators' time
    with clock.paused():
        for evaluator in evaluators:
            found = evaluator.evaluate(state, step)
            for name, pictures in found.images.items():
                metrics.images(step, name, pictures, found.about)
            if found.scalars:
                metrics.scalars(step, found.scalars)
            watchdog.progressed()
