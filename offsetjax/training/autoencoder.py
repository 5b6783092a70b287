"""The task `autoencoder`: the autoencoder alone, which a training of the denoiser then starts from."""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from offsetjax.config.families import family_of_values
from offsetjax.config.schema import default
from offsetjax.models.family import Family
from offsetjax.models.task import Task, Values

# What it does not read: these sections, and these fields.
_SECTIONS = ("captions.", "encode.", "lora.", "noise.", "schedule.", "timesteps.")
_FIELDS = (
    "data.cached_latents",
    "model.attention",
    "model.remat",
    "model.scan_layers",
    "loss.min_snr_gamma",
    "loss.min_timestep",
    "loss.max_timestep",
    "loss.weighting",
    "train.text_encoders",
    "optimizer.text_encoder_learning_rate",
    "sample.every_steps",
    "sample.prompts",
    "sample.brightness",
    "validation.every_steps",
    "probe.every_steps",
)
_NAMED_BY_PRESETS = ("schedule.prediction_type",)


def _own(family: Family) -> tuple[str, ...]:
    return (family.autoencoder,)


def _objective(pipeline: Any, config: ConfigDict) -> Any:
    from offsetjax.training.objective import autoencoder_objective

    return autoencoder_objective(pipeline, config.seed, config.loss.kl_weight)


def _rules(values: Values) -> Iterator[tuple[object, str]]:
    """It may name the other networks, as presets do, and how a picture is drawn: no picture is asked for."""
    wrong = [
        path
        for path, value in values.items()
        if (path.startswith(_SECTIONS) or path in _FIELDS)
        and path not in _NAMED_BY_PRESETS
        and value not in (default(path), 0, "", ())
    ]
    if set(values["model.from_scratch"]) - {family_of_values(values).autoencoder}:
        wrong.append("model.from_scratch")
    back = "it" if len(wrong) == 1 else "them"
    yield wrong, f"{', '.join(wrong)} cannot apply to task = {values['task']!r}; set {back} back"


AUTOENCODER = Task(
    name="autoencoder",
    title="an autoencoder alone",
    parts=_own,
    trained=lambda family, learns_text: _own(family),
    denoises=False,
    objective=_objective,
    formats=("diffusers",),
    rules=_rules,
)
