"""Which settings of the section `optimizer` go together: what an optimizer or a schedule does not read is refused."""

from collections.abc import Iterator, Mapping
from typing import Any

from offsetjax.config.schema import default

# What each of ours reads of its own; of others' optimizers nothing is known.
_READ = {
    "adamw": ("b1", "b2", "eps", "moment_dtype"),
    "adafactor": (),
    "dadapt_adamw": ("b1", "b2", "eps"),
    "lion": ("b1", "b2", "moment_dtype"),
    "muon": ("b1", "b2", "eps", "moment_dtype"),
    "prodigy": ("b1", "b2", "eps"),
    "sgd": ("b1", "moment_dtype"),
}
_OF_SCHEDULES = {
    "decay_end": ("cosine", "linear", "polynomial", "warmup_stable_decay", "cosine_restarts"),
    "decay_power": ("polynomial",),
    "decay_fraction": ("warmup_stable_decay",),
    "decay_cycles": ("cosine_restarts",),
}
_FIND_THEIR_RATE = ("dadapt_adamw", "prodigy")


def optimizer_rules(values: Mapping[str, Any]) -> Iterator[tuple[object, str]]:
    """Whether something is wrong, and what, for the values of a config by their paths."""
    name, decay = values["optimizer.name"], values["optimizer.decay"]
    if name in _READ:
        for field in sorted({field for fields in _READ.values() for field in fields} - set(_READ[name])):
            yield _unread(values, f"optimizer.{field}", f"optimizer.name = {name!r}")
    for field, decays in _OF_SCHEDULES.items():
        if decay not in decays:
            yield _unread(values, f"optimizer.{field}", f"optimizer.decay = {decay!r}")
    begin, steps = values["optimizer.decay_from"], values["train.steps"]
    yield (
        begin >= steps and begin,
        f"optimizer.decay_from = {begin} must be below train.steps = {steps}, over whose rest the learning rate falls",
    )
    yield (
        begin and decay == "constant" and not values["optimizer.warmup_steps"],
        "optimizer.decay_from cannot apply to optimizer.decay = 'constant' without a warm-up; leave it out",
    )
    yield (
        begin and values["train.stages"],
        "optimizer.decay_from cannot apply to train.stages, each of which has a schedule of its own; leave it out",
    )
    yield (
        name in _FIND_THEIR_RATE and len(values["train.stages"]) > 1,
        f"train.stages cannot apply to optimizer.name = {name!r}, which finds one learning rate over the whole "
        "training; use adamw",
    )


def _unread(values: Mapping[str, Any], path: str, reader: str) -> tuple[object, str]:
    return (
        values[path] != default(path),
        f"{path} = {values[path]!r} cannot apply to {reader}, which does not read it; leave it out",
    )
