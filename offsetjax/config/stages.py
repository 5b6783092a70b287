"""The stages of a training: fields that change at steps that are known before it begins.

Each text of `train.stages` is a stage, written as the command line writes fields, with its own number of steps:

    config.train.steps = 160_000
    config.train.stages = (
        "train.steps=100000 data.resolution=256 train.global_batch_size=2048 optimizer.learning_rate=1e-4",
        "train.steps=40000 data.resolution=512 train.global_batch_size=1024 optimizer.learning_rate=5e-5",
        "train.steps=20000 data.resolution=1024 data.bucket_count=7 train.global_batch_size=512",
    )

What a stage does not say is as the config has it. A stage is, to whatever reads its config, a training without stages.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from offsetjax.config.schema import may_change_on_resume
from offsetjax.config.settings import assign, flatten
from offsetjax.config.texts import settings_in
from offsetjax.errors import UserError

_STAGES, _STEPS = "train.stages", "train.steps"
# What may change at a seam: neither the weights, nor their moments and averages, nor what is learnt of the noise do.
CHANGING = (
    _STEPS,
    "train.global_batch_size",
    "train.accumulate_steps",
    "data.path",
    "data.split",
    "data.resolution",
    "data.buckets",
    "data.bucket_count",
    "data.bucket_step",
    "data.max_aspect",
    "data.max_enlargement",
    "data.equal_tokens",
    "data.mixed_sizes",
    "optimizer.learning_rate",
    "optimizer.text_encoder_learning_rate",
    "optimizer.warmup_steps",
    "optimizer.decay",
)


@dataclass(frozen=True)
class Stage:
    """Some steps of a training, and what is set for them.

    Attributes:
        number: from 1 on.
        count: how many stages there are; 1 for a training that has none.
        steps: the updates that are made before each of its steps: its first step is `steps.start + 1`, its last one
            `steps.stop`.
        settings: fields by path.
    """

    number: int
    count: int
    steps: range
    settings: Mapping[str, Any]

    def config(self, config: ConfigDict) -> ConfigDict:
        """The config of this stage alone; `train.steps` is that of the whole training, as `noise.anneal` reads it."""
        if not config.train.stages:
            return config
        config = config.copy_and_resolve_references()
        for path, value in self.settings.items():
            assign(config, path, value)
        assign(config, _STAGES, (), explicit=False)
        return config

    def values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The same, of values by their paths."""
        return {**values, **self.settings, _STAGES: ()}

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Says of a UserError inside which stage it is of, where there are several."""
        try:
            yield
        except UserError as error:
            if self.count == 1 and not self.settings:
                raise
            raise UserError(f"config: {_STAGES}, stage {self.number}: {str(error).removeprefix('config: ')}") from error

    def __str__(self) -> str:
        settings = " ".join(f"{path}={value}" for path, value in self.settings.items())
        return f"stage {self.number} of {self.count}, steps {self.steps.start + 1:,} to {self.steps.stop:,}: {settings}"


def stages_of(config: ConfigDict) -> tuple[Stage, ...]:
    """The stages of a config, in their order; one of all steps where it has none.

    Raises:
        UserError: a text that is no stage, or steps that do not add up.
    """
    return stages_in(dict(flatten(config)))


def stages_in(values: Mapping[str, Any]) -> tuple[Stage, ...]:
    """The same, of the values of a config by their paths."""
    texts, total = values.get(_STAGES, ()), values[_STEPS]
    if not texts:
        return (Stage(1, 1, range(total), {}),)
    begin, stages = 0, []
    for number, text in enumerate(texts, start=1):
        settings = _settings(text, f"{_STAGES}, stage {number}")
        end = begin + settings.pop(_STEPS)
        stages.append(Stage(number, len(texts), range(begin, end), settings))
        begin = end
    if begin != total:
        raise UserError(
            f"config: train.steps = {total}, but the stages of train.stages have {begin} steps together; set "
            f"train.steps = {begin}"
        )
    return tuple(stages)


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage that makes a step, from 1 on; the first of a model before its first step, the last of one beyond."""
    return next((stage for stage in stages if step <= stage.steps.stop), stages[-1])


def config_at(config: ConfigDict, step: int) -> ConfigDict:
    """The config of the stage that makes a step."""
    return stage_at(stages_of(config), step).config(config)


def config_of_stage(config: ConfigDict, number: int | None) -> ConfigDict:
    """The config of a stage, by its number, for what is prepared for one.

    Raises:
        UserError: there is no such stage, or there are several and none is named.
    """
    stages = stages_of(config)
    if number is None and len(stages) > 1:
        raise UserError(f"config: train.stages has {len(stages)} stages; say for which, such as --stage=1")
    if number is not None and not 1 <= number <= len(stages):
        raise UserError(f"config: there is no stage {number}: train.stages has {len(stages)}")
    return stages[(number or 1) - 1].config(config)


def _settings(text: str, where: str) -> dict[str, Any]:
    """The fields of a stage, each once, of its type and in its range."""

    def refused(path: str) -> str:
        return "" if path in CHANGING else f"cannot change between stages; {', '.join(CHANGING)} can"

    settings = settings_in(text, where, "train.steps=1000 data.resolution=256", refused)
    if _STEPS not in settings:
        raise UserError(f"config: {where}: it has no train.steps; say how long it is, such as train.steps=1000")
    return settings


def check_together(values: Mapping[str, Any]) -> None:
    """Refuses stages that make no training together.

    Args:
        values: of a config by their paths, each of which is in its range.

    Raises:
        UserError: they do not, or their texts are none.
    """
    every = [stage.values(values) for stage in stages_in(values)]
    rate = "optimizer.text_encoder_learning_rate"
    if len({bool(each[rate]) for each in every}) > 1:
        raise UserError(f"config: train.stages: {rate} must be above 0 in all stages, or in none")
    resolutions = sorted({each["data.resolution"] for each in (values, *every)})
    if (
        values[_STAGES]
        and len(resolutions) > 1
        and values["noise.calibration"]
        and not values["noise.reference_resolution"]
    ):
        remedy = (
            "give noise.spectrum a formula, which holds at all sizes"
            if values["noise.kind"] == "spectral"
            else "set noise.reference_resolution, by which the strength follows the size"
        )
        raise UserError(
            f"config: noise.calibration is of one data.resolution, but with train.stages there are "
            f"{', '.join(map(str, resolutions))}; {remedy}"
        )


def check_past(before: Mapping[str, Any], after: Mapping[str, Any], step: int) -> None:
    """Refuses to resume with stages that contradict what has been trained: what is still to come may change.

    Args:
        before: the values of the run's config, by path.
        after: those that it resumes with.
        step: the newest that is saved.

    Raises:
        UserError: with the field of the stage that has begun.
    """
    if not (before[_STAGES] or after[_STAGES]):
        return
    old, new = stages_in(before), stages_in(after)
    for number, stage in enumerate(old[: stage_at(old, step).number] if step else (), start=1):
        other = new[min(number, len(new)) - 1]
        is_past = stage.steps.stop <= step
        if other.steps.start != stage.steps.start or (
            other.steps != stage.steps if is_past else other.steps.stop < step
        ):
            raise UserError(
                f"config: train.stages: stage {number} has begun, with {_steps(stage)}, but now has {_steps(other)}; "
                "what is past must stay"
            )
        then, now = stage.values(before), other.values(after)
        for path in CHANGING:
            if then[path] != now[path] and not may_change_on_resume(path):
                raise UserError(
                    f"config: train.stages: stage {number} has begun, with {path} = {then[path]!r}, but now has "
                    f"{now[path]!r}; set it back, or give another --workdir"
                )


def _steps(stage: Stage) -> str:
    return f"steps {stage.steps.start + 1} to {stage.steps.stop}"
