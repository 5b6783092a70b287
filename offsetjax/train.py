"""The training loop: data → encode → noise → loss → update → checkpoint → export.

`training/setup.py` opens the data and the parts, `training/objective.py` holds encode → noise → loss,
`training/step.py` the update, `storage/` and `exporting/` the rest. What happens between two steps is here.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from etils import epath
from jax.sharding import NamedSharding
from ml_collections import ConfigDict
from orbax.checkpoint import CheckpointManager

from offsetjax.config import Origin
from offsetjax.data.buckets import Size
from offsetjax.data.devices import in_steps, on_devices
from offsetjax.data.stream import Stream, check_replaced
from offsetjax.errors import Status, UserError
from offsetjax.files import written_to
from offsetjax.parallel import processes, sharding
from offsetjax.parallel.fallback import warn_of_cpu
from offsetjax.parallel.preemption import Preemption
from offsetjax.parallel.watchdog import Watchdog
from offsetjax.storage import checkpoint
from offsetjax.storage.lock import WorkdirLock
from offsetjax.storage.saving import Saver
from offsetjax.training import rollback
from offsetjax.training.abstract import model_flops
from offsetjax.training.evaluators import Evaluator
from offsetjax.training.goodput import Goodput, in_words
from offsetjax.training.guard import Guard
from offsetjax.training.instruments import Instruments, compilation_cache, ideal_of_sizes
from offsetjax.training.metrics import Metrics, StepClock, open_metrics
from offsetjax.training.mixed import PART_LOSSES
from offsetjax.training.placed import jit_train_step
from offsetjax.training.programs import SizeLosses
from offsetjax.training.rollback import RollBack
from offsetjax.training.setup import Run, open_run
from offsetjax.training.staged import ReadyStage, make_ready, open_stages
from offsetjax.training.starts import write_start
from offsetjax.training.states import SKIPPED, first_state
from offsetjax.training.step import TrainState
from offsetjax.training.streams import open_sources
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
        sources = open_sources(config)
        warn_of_cpu()
        run = open_run(config, epath.Path(workdir), sources[0], lock, sources[1:])
        config = run.config
        watchdog.progressed()
        stages = open_stages(run, sources)
        first, *others = (each.stream for each in stages)
        with compilation_cache(workdir), _open_checkpoints(run) as manager:
            rolled_back = rollback.read(run.workdir)
            state, state_shardings, in_a_row = first_state(run, manager, first, rolled_back, others)
            watchdog.progressed()
            if int(state.step) >= config.train.steps:
                _log.info("%s has its %d steps; raise train.steps to continue", workdir, config.train.steps)
                return
            write_start(run.workdir, int(state.step), devices_in_words(run.mesh), origin)
            ready = dict[int, ReadyStage]()

            def train_from(state: TrainState, in_a_row: int, rolled_back: RollBack) -> RollBack | None:
                left = [each for each in stages if each.stage.steps.stop > int(state.step)]
                new = [each for each in left if each.stage.number not in ready]
                made = make_ready(
                    new, lambda run: jit_train_step(run, state_shardings), state, goodput, watchdog.progressed
                )
                ready.update({each.open.stage.number: each for each in made})
                saver = _open_saver(run, manager, lock, checkpoint.size_of(state))
                around = _Around(manager, saver, preemption, watchdog, goodput, rolled_back)
                return _train_stages(run, [ready[each.stage.number] for each in left], around, state, in_a_row)

            if goes_back := train_from(state, in_a_row, rolled_back):
                rollback.write(run.workdir, goes_back)
                goodput.begins_again()
                state, _, in_a_row = first_state(run, manager, first, goes_back, others)
                train_from(state, in_a_row, goes_back)


def _open_checkpoints(run: Run) -> CheckpointManager:
    kept = run.config.checkpoint
    return checkpoint.open_checkpoints(run.workdir, kept.max_to_keep, kept.keep_every_steps)


def _open_saver(run: Run, manager: CheckpointManager, lock: WorkdirLock, state_bytes: int) -> Saver:
    saved = run.config.checkpoint
    return Saver(manager, lock, state_bytes, every_steps=saved.every_steps, every_minutes=saved.every_minutes)


@dataclass(frozen=True)
class _Around:
    """What goes along from stage to stage."""

    manager: CheckpointManager
    saver: Saver
    preemption: Preemption
    watchdog: Watchdog
    goodput: Goodput
    rolled_back: RollBack


def _train_stages(
    run: Run, stages: Sequence[ReadyStage], around: _Around, state: TrainState, skipped_in_a_row: int
) -> RollBack | None:
    """Trains the stages that are left to their end; or gives to where the run has to go back, which it does once."""
    train, start = run.config.train, int(state.step)
    to_compile = sum(each.to_compile for each in stages)
    instruments = Instruments(run.workdir, train.profile_steps, run.mesh.local_devices, start + 1, to_compile)
    metrics = open_metrics(train.writers, run.workdir, start, train.steps)
    around.goodput.resumed(start)
    try:
        for each in stages:
            if each.open.stage.count > 1:
                _log.info("from step %d on: %s", int(state.step) + 1, each.open.stage)
            found = _loop(each, around, metrics, instruments, state, skipped_in_a_row)
            if isinstance(found, RollBack):
                return found
            state, skipped_in_a_row = found
        _log.info("time: %s", in_words(around.goodput.totals()))
        if skipped := int(state.skipped):
            _log.warning("%d steps changed nothing; see the warnings at each", skipped)
        if replaced := int(state.replaced):
            _log.warning("%d times a record that cannot be read was left out; see data.max_bad_fraction", replaced)
        if cut := int(state.truncated):
            _log.warning("%d captions were longer than the text encoders read, and cut; see encode.long_captions", cut)
        return None
    finally:
        metrics.close()
        instruments.close()
        around.goodput.write()


def _loop(
    ready: ReadyStage,
    around: _Around,
    metrics: Metrics,
    instruments: Instruments,
    state: TrainState,
    skipped_in_a_row: int,
) -> tuple[TrainState, int] | RollBack:
    """Trains to the end of a stage; gives the state there, and how many steps in a row were skipped before it."""
    run, stream, evaluators = ready.open.run, ready.open.stream, ready.evaluators
    preemption, watchdog, goodput = around.preemption, around.watchdog, around.goodput
    saver, rolled_back = around.saver, around.rolled_back
    train, frozen = run.config.train, run.step_frozen
    start, end = int(state.step), run.steps.stop
    about = {"stage": ready.open.stage.number} if ready.open.stage.count > 1 else {}

    def sizes_of(step: int) -> tuple[Size, ...]:
        return stream.sizes_of(rolled_back.batch_of(step))

    def count_of(step: int) -> int:
        return sum(stream.batch_sizes[size] for size in sizes_of(step))

    def ideal_of(step: int) -> float:
        return sum(ideal[size] for size in sizes_of(step)) if ideal else 0.0

    flops_of = partial(model_flops, run.config, run.pipeline)
    ideal = ideal_of_sizes(flops_of, run.mesh.devices.ravel(), stream.batch_sizes)
    clock = StepClock(start, count_of, goodput, ideal_of)
    size_losses = SizeLosses(sizes_of) if len(stream.sizes) > 1 else None
    host_batches = rolled_back.batches(stream, start)
    split = NamedSharding(run.mesh, sharding.BATCH)
    batches = in_steps(on_devices(host_batches, split, stream.whole_size, 2 * stream.parts), stream.parts)
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
    write = partial(_write, metrics, stream, clock, size_losses, about)
    try:
        if preemption.reached():
            raise preemption.stopped(f"before step {start + 1}")
        if start == 0:
            _evaluate(evaluators, state, 0, metrics, clock, watchdog)
        for step in range(start + 1, end + 1):
            with clock.waiting_for_data():
                batch = next(batches)
            instruments.before(step)
            with clock.waiting(), jax.transfer_guard("disallow"):
                state, step_metrics = ready.train_step(state, frozen, batch)
            instruments.after(step, state)
            if size_losses:
                size_losses.add(step, *step_metrics.get(PART_LOSSES, (step_metrics["loss"],)))
            if last:  # one step ahead of the devices, no more: a stall shows, and to stop is quick
                with clock.waiting():
                    guard.look(step - 1, last)
            last = step_metrics
            watchdog.progressed()
            if unwritten:  # a step late: the devices are at work on the next one while these are fetched
                wrong = write(*unwritten)
                unwritten = None
            if step % train.log_every_steps == 0 or step in (start + 1, end):
                unwritten = (step, step_metrics)
            # Before the checkpoint: a run that is killed in between looks again when it resumes.
            if due := [evaluator for evaluator in evaluators if evaluator.is_due(step, end)]:
                _evaluate(due, state, step, metrics, clock, watchdog)
            is_preempted, is_due = preemption.reached(), saver.is_due(step)
            if step == end:
                guard.look(step, last)
            is_over = guard.is_over  # by the steps before this one: a run that resumes here finds the same
            if is_over and train.roll_back and not rolled_back:
                saver.finish()
                if goes_back := rollback.before(around.manager.all_steps(), guard.first_in_a_row, step):
                    _log.warning("%s; the run goes back to step %d, and reads on", guard.found(), goes_back.to)
                    return goes_back
            if is_over:
                wrong = guard.mistake(step)
            if is_preempted or is_due or wrong or step == end:
                if unwritten:  # a save waits for the step anyway, and who resumes after it never sees this step again
                    wrong = write(*unwritten) or wrong
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
        return state, guard.in_a_row
    finally:
        host_batches.close()


def _write(
    metrics: Metrics,
    stream: Stream,
    clock: StepClock,
    size_losses: SizeLosses | None,
    about: Mapping[str, float],
    step: int,
    values: Any,
) -> UserError | None:
    """Logs a step; gives why the run has to end with it, where too many records could not be read."""
    values = {name: value.item() for name, value in jax.device_get(values).items() if name != PART_LOSSES}
    by_size = size_losses.means(step) if size_losses else {}
    metrics.scalars(step, {**values, **about, **by_size, **clock.lap(step)})
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
