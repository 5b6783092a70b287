"""The task `diffusion`: the denoiser, and the text encoders where they learn; the autoencoder is frozen."""

from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from offsetjax.config.schema import default
from offsetjax.models.family import Family
from offsetjax.models.task import Task, Values


def _trained(family: Family, learns_text: bool) -> tuple[str, ...]:
    return (family.denoiser, *(family.encoders if learns_text else ()))


def _objective(pipeline: Any, config: ConfigDict) -> Any:
    from offsetjax.training.objective import diffusion_objective

    return diffusion_objective(pipeline, config.seed, config.encode.caption_dropout, config.loss)


def _evaluators(run: Any, source: Any) -> Sequence[Any]:
    from offsetjax.training.evaluators import of_diffusion

    return list(of_diffusion(run, source))


def _advice(pipeline: Any, config: ConfigDict) -> Sequence[str]:
    from offsetjax.sampling.reach import training_advice

    return list(training_advice(pipeline, config.sample, config.data.resolution, config.optimizer.ema_decay))


def _rules(values: Values) -> Iterator[tuple[object, str]]:
    yield (
        values["loss.kl_weight"] != default("loss.kl_weight"),
        f"loss.kl_weight cannot apply to task = {values['task']!r}, which trains no autoencoder; set it back",
    )


DIFFUSION = Task(
    name="diffusion",
    title="a denoiser",
    parts=lambda family: family.parts,
    trained=_trained,
    denoises=True,
    objective=_objective,
    evaluators=_evaluators,
    advice=_advice,
    rules=_rules,
)
