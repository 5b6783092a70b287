"""A plan for pictures of several sizes: one of each, and what follows for the training.

The memory is that of the largest; a step takes the mean over the sizes' steps, by how many of the training's each has.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from offsetjax.data.buckets import Size, check_sizes, parse_size
from offsetjax.data.sizes import Buckets, batch_size_of
from offsetjax.data.source import open_data
from offsetjax.errors import UserError
from offsetjax.models.resolve import resolution_unit
from offsetjax.plan.estimate import Plan
from offsetjax.plan.program import architecture
from offsetjax.training.streams import open_buckets, parts_of_sizes

_MEANS = ("step_seconds", "hours", "chip_hours")


class Share(NamedTuple):
    """A size, the examples of its batches, and the share of the steps that have it."""

    size: Size
    batch: int
    share: float


def shares_of(config: ConfigDict) -> tuple[list[Share], str]:
    """The sizes of a config's pictures, and what is assumed of their shares; none where all are squares.

    Raises:
        UserError: sizes that the networks cannot take, or that only the data could tell.
    """
    data = config.data
    if not (data.buckets or data.bucket_count):
        return [], ""
    config = architecture(config)
    parts = parts_of_sizes(config)
    mixed = "; a step whose parts differ in size takes the mean of steps of one size each" * (parts > 1)
    try:
        source = open_data(data)
    except (UserError, OSError) as error:
        if not data.buckets:
            raise UserError(
                f"plan: data.bucket_count = {data.bucket_count} chooses sizes for the data, which cannot be read "
                f"({error}); give data.path, or sizes as data.buckets"
            ) from error
        sizes = [parse_size(text) for text in data.buckets]
        check_sizes(sizes, resolution_unit(config))
        train = config.train.global_batch_size // parts
        counts = [batch_size_of(size, train, data.resolution, data.equal_tokens) * parts for size in sizes]
        each = 1 / len(sizes)
        found = [Share(size, count, each) for size, count in zip(sizes, counts, strict=True)]
        return found, f"each size has as many steps, for data.path is not there to count its pictures{mixed}"
    buckets = open_buckets(config, source)
    assert buckets
    return _of_buckets(buckets, parts), f"the share of each size is that of its pictures{mixed}"


def _of_buckets(buckets: Buckets, parts: int) -> list[Share]:
    counts = np.array(buckets.plan.batch_sizes) * parts
    steps = buckets.assignment.counts / counts
    pairs = zip(buckets.sizes, counts.tolist(), (steps / steps.sum()).tolist(), strict=True)
    return [Share(size, count, share) for size, count, share in pairs if share]


def joined(plans: Sequence[Plan], shares: Sequence[Share], assumption: str) -> Plan:
    """The plan of a training from those of its sizes: that of the size that takes the most memory, with means.

    `sizes` has a row for each.
    """
    largest = max(plans, key=lambda plan: plan["bytes_per_device"]["total"])
    fits = [plan["bytes_per_device"]["fits"] for plan in plans]
    memory = {**largest["bytes_per_device"], "fits": None if None in fits else all(fits)}
    joined = {**largest, "bytes_per_device": memory, "sizes": list(map(_row, plans, shares))}
    joined["assumptions"] = [*largest["assumptions"], assumption]
    is_cached = all(plan["compiled"]["is_cached"] for plan in plans)
    seconds = round(sum(plan["compiled"]["seconds"] for plan in plans), 1)
    joined["compiled"] = {**largest["compiled"], "seconds": seconds, "is_cached": is_cached}
    weights = [share.share for share in shares]
    joined["flops_per_device"] = {
        kind: sum(w * plan["flops_per_device"][kind] for w, plan in zip(weights, plans, strict=True))
        for kind in largest["flops_per_device"]
    }
    batch = sum(share.share * share.batch for share in shares)
    joined["global_batch_size"], joined["batch_per_device"] = round(batch, 2), batch / largest["devices"]
    if all("step_seconds" in plan for plan in plans):
        for name in _MEANS:
            joined[name] = [_mean([plan[name][end] for plan in plans], weights) for end in (0, 1)]
        joined["images_per_second"] = [step and batch / step for step in joined["step_seconds"]]
        # Of each size as much is done as its MFU says in as long as its steps take.
        joined["mfu"] = [
            step and _mean([_product(plan, end) for plan in plans], weights, step)
            for end, step in enumerate(joined["step_seconds"])
        ]
    return joined


def _product(plan: Plan, end: int) -> float | None:
    mfu, step = plan["mfu"][end], plan["step_seconds"][end]
    return None if mfu is None or step is None else mfu * step


def _mean(values: Sequence[float | None], weights: Sequence[float], over: float = 1.0) -> float | None:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return sum(weight * value for weight, value in zip(weights, known, strict=True)) / over


def _row(plan: Plan, share: Share) -> dict[str, Any]:
    kept: dict[str, Any] = {name: plan[name] for name in ("step_seconds", "images_per_second", "mfu") if name in plan}
    return {
        "size": str(share.size),
        "share_of_steps": share.share,
        "global_batch_size": share.batch,
        "bytes_per_device": plan["bytes_per_device"]["total"],
        "fits": plan["bytes_per_device"]["fits"],
        "model_flops_per_device": plan["flops_per_device"]["model"],
        "compile_seconds": plan["compiled"]["seconds"],
        **kept,
    }
