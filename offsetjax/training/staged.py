"""The stages of a run, ready to be trained one after the other: each with its batches, programs and evaluators.

A run without stages is one of all steps. A stage goes on in the data where the one before has stopped.
"""

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from offsetjax.config import Stage, stages_of
from offsetjax.data.source import Source
from offsetjax.data.stream import Stream
from offsetjax.training.abstract import abstract_batch
from offsetjax.training.evaluators import Evaluator, open_evaluators
from offsetjax.training.goodput import Goodput
from offsetjax.training.mixed import programs_of, with_compiled
from offsetjax.training.objective import Batch
from offsetjax.training.programs import compiled_ahead
from offsetjax.training.setup import Run
from offsetjax.training.step import TrainState, TrainStep
from offsetjax.training.streams import open_stream

_log = logging.getLogger("offsetjax")


@dataclass(frozen=True)
class OpenStage:
    """A stage whose data are open.

    Attributes:
        run: with the stage's config and pipeline.
        stream: its batches, by the number of the step less 1.
    """

    stage: Stage
    run: Run
    stream: Stream


@dataclass(frozen=True)
class ReadyStage:
    """A stage that can be trained.

    Attributes:
        to_compile: of its programs, how many are compiled when their sizes come.
    """

    open: OpenStage
    train_step: TrainStep
    evaluators: Sequence[Evaluator]
    to_compile: int


def open_stages(run: Run, sources: Sequence[Source]) -> list[OpenStage]:
    """The stages of a run, with the data of each.

    Raises:
        UserError: sizes that do not fit, or processes of one mesh whose data differ.
    """
    shown, found = 0, list[OpenStage]()
    for stage, source in zip(stages_of(run.config), sources, strict=True):
        own = run.of_stage(stage)
        if stage.count > 1:
            _log.info("%s", stage)
        with stage.named():
            stream = open_stream(own.config, own.pipeline, source, run.mesh)
        stream = stream.going_on_after(shown, stage.steps.start)
        shown = stream.examples_before(stage.steps.stop)
        found.append(OpenStage(stage, own, stream))
    return found


def make_ready(
    stages: Sequence[OpenStage],
    jit: Callable[[Run], TrainStep],
    state: TrainState,
    goodput: Goodput,
    progressed: Callable[[], None],
) -> list[ReadyStage]:
    """Stages that are to be trained, with all of their programs where these are compiled ahead.

    Args:
        jit: gives the train step of a stage.
        progressed: is called after each program.

    Raises:
        UserError: a hold-out that cannot be read, or that shares pictures with the training data.
    """
    evaluators = []
    for each in stages:
        with each.stage.named():
            evaluators.append(open_evaluators(each.run, each.stream.source))
    steps = [jit(each.run) for each in stages]
    batches = [_abstract_batches(each) for each in stages]
    at_once = stages[0].run.config.train.compile_ahead if stages else 0
    if not at_once or sum(map(len, batches)) < 2:
        ready = zip(stages, steps, evaluators, batches, strict=True)
        return [ReadyStage(each, step, own, len(sizes)) for each, step, own, sizes in ready]
    frozen = stages[0].run.step_frozen
    programs = [
        programs_of(step, state, frozen, sizes, f" of stage {each.stage.number}" * (each.stage.count > 1))
        for each, step, sizes in zip(stages, steps, batches, strict=True)
    ]
    with goodput.spent_on("compile"):
        compiled = iter(compiled_ahead(list(itertools.chain(*programs)), at_once, progressed))
    return [
        ReadyStage(each, with_compiled(step, [(program, next(compiled)) for program in of_stage]), own, 0)
        for each, step, own, of_stage in zip(stages, steps, evaluators, programs, strict=True)
    ]


def _abstract_batches(opened: OpenStage) -> dict[str, Batch]:
    pipeline, is_cached = opened.run.pipeline, opened.run.config.data.cached_latents
    sizes = opened.stream.batch_sizes.items()
    return {str(size): abstract_batch(pipeline, size, count, is_cached) for size, count in sizes}
