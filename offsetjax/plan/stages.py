"""A plan for a training in stages: one of each, and what follows for the whole.

The memory is that of the stage that takes the most; hours add up, and a step takes the mean over all steps.
"""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from offsetjax.config import Stage, stages_of
from offsetjax.plan.estimate import Plan


def of_each_stage(config: ConfigDict) -> list[tuple[Stage, ConfigDict]]:
    """The stages of a config, and the config of each as a training of its own length."""
    found = []
    for stage in stages_of(config):
        own = stage.config(config).copy_and_resolve_references()
        own.train.steps = len(stage.steps)
        found.append((stage, own))
    return found


def whole(plans: Sequence[Plan], stages: Sequence[Stage]) -> Plan:
    """The plan of a training from those of its stages; `stages` has a row for each."""
    if len(plans) == 1:
        return plans[0]
    largest = max(plans, key=lambda plan: plan["bytes_per_device"]["total"])
    fits = [plan["bytes_per_device"]["fits"] for plan in plans]
    steps = [len(stage.steps) for stage in stages]
    weights = [each / sum(steps) for each in steps]
    found = {name: value for name, value in largest.items() if name not in ("sizes", "largest_batch")}
    found["bytes_per_device"] = {**largest["bytes_per_device"], "fits": None if None in fits else all(fits)}
    found["stages"] = [_row(plan, stage) for plan, stage in zip(plans, stages, strict=True)]
    found["assumptions"] = list(dict.fromkeys(each for plan in plans for each in plan["assumptions"]))
    found["compiled"] = {
        **largest["compiled"],
        "seconds": round(sum(plan["compiled"]["seconds"] for plan in plans), 1),
        "is_cached": all(plan["compiled"]["is_cached"] for plan in plans),
    }
    found["flops_per_device"] = {
        kind: sum(weight * plan["flops_per_device"][kind] for weight, plan in zip(weights, plans, strict=True))
        for kind in largest["flops_per_device"]
    }
    batch = sum(weight * plan["global_batch_size"] for weight, plan in zip(weights, plans, strict=True))
    found["global_batch_size"], found["batch_per_device"] = round(batch, 2), batch / largest["devices"]
    if all("step_seconds" in plan for plan in plans):
        for name in ("hours", "chip_hours"):
            found[name] = [_sum([plan[name][end] for plan in plans]) for end in (0, 1)]
        found["step_seconds"] = [hours and hours * 3600 / sum(steps) for hours in found["hours"]]
        found["images_per_second"] = [step and batch / step for step in found["step_seconds"]]
        # In each stage as much is done as its MFU says in as long as it takes.
        found["mfu"] = [
            hours and _sum([_product(plan, end) for plan in plans], over=hours)
            for end, hours in enumerate(found["hours"])
        ]
    return found


def _product(plan: Plan, end: int) -> float | None:
    mfu, hours = plan["mfu"][end], plan["hours"][end]
    return None if mfu is None or hours is None else mfu * hours


def _sum(values: Sequence[float | None], over: float = 1.0) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / over if len(known) == len(values) else None


def _row(plan: Plan, stage: Stage) -> dict[str, Any]:
    kept = ("step_seconds", "images_per_second", "mfu", "hours", "chip_hours", "sizes", "largest_batch")
    return {
        "stage": stage.number,
        "settings": dict(stage.settings),
        "steps": len(stage.steps),
        "global_batch_size": plan["global_batch_size"],
        "bytes_per_device": plan["bytes_per_device"],
        "model_flops_per_device": plan["flops_per_device"]["model"],
        "compile_seconds": plan["compiled"]["seconds"],
        **{name: plan[name] for name in kept if name in plan},
    }
