"""The command `offsetjax plan`."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console

from offsetjax import log
from offsetjax.errors import UserError
from offsetjax.files import check_file, write_whole
from offsetjax.plan.compile import Compiled, Request, check_topology, compile_step
from offsetjax.plan.estimate import Plan, estimate
from offsetjax.plan.search import largest_batch
from offsetjax.plan.show import show
from offsetjax.plan.sizes import Share, joined, shares_of
from offsetjax.plan.stages import of_each_stage, whole


def plan(
    config: ConfigDict,
    topologies: Sequence[str],
    *,
    num_slices: int = 1,
    is_full: bool = False,
    searches: bool = False,
    out: str | None = None,
    cache_dir: str | None = None,
) -> list[Plan]:
    """Compiles the train step of a config for each topology, prints what follows, and writes it as JSON.

    Args:
        topologies: such as `v5e:4x4`; `cpu:8` are 8 virtual devices of this machine.
        num_slices: of each topology, joined over the data-centre network.
        is_full: generate the code too, for the compiler's own estimate of the time; takes ten times as long.
        searches: look for the largest batch that fits as well.
        out: a file for the JSON.
        cache_dir: where what is compiled is kept; by default ~/.cache/offsetjax/plan.

    Raises:
        UserError: a topology that cannot be had, or on which the config cannot run.
    """
    if num_slices < 1:
        raise UserError(f"plan: --num_slices={num_slices} must be at least 1")
    if out:
        check_file("plan", out)
    for topology in topologies:
        check_topology(topology, num_slices)
        if searches and topology.startswith("cpu"):
            raise UserError(f"plan: --search cannot apply to {topology}, whose memory is not known; leave it out")
    stages = of_each_stage(config)
    if searches and any(each.data.equal_tokens for _, each in stages):
        raise UserError("plan: --search cannot apply with data.equal_tokens, by which batches differ; leave it out")
    folder = Path(cache_dir) if cache_dir else Path.home() / ".cache" / "offsetjax" / "plan"
    shares = []
    for stage, each in stages:
        with stage.named():
            shares.append(shares_of(each))
    plans = []
    for topology in topologies:
        of_stages = []
        for (stage, each), of_sizes in zip(stages, shares, strict=True):
            with stage.named():
                request = Request(_of_one_size(each), topology, num_slices, is_full, folder)
                of_stages.append(_plan(request, *of_sizes, searches))
        plans.append(whole(of_stages, [stage for stage, _ in stages]))
    if out:
        write_whole(out, json.dumps(plans, indent=2) + "\n")
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(show(plans))
    return plans


def _of_one_size(config: ConfigDict) -> ConfigDict:
    """The config of steps whose parts have one size: a step of several is planned as the mean of these."""
    config = config.copy_and_resolve_references()
    config.data.mixed_sizes = False
    return config


def _plan(request: Request, shares: Sequence[Share], assumption: str, searches: bool) -> Plan:
    """The plan of a training without stages, or of one of them."""
    of_sizes = [replace(request, size=share.size, count=share.batch) for share in shares] or [request]
    each = [estimate(one, _compile(one)) for one in of_sizes]
    found = joined(each, shares, assumption) if shares else each[0]
    if searches:
        largest = max(range(len(each)), key=lambda place: each[place]["bytes_per_device"]["total"])
        found["largest_batch"] = _search(of_sizes[largest], each[largest])
    return found


def _compile(request: Request) -> Compiled:
    """Compiles with a line that says what is done and since when; where nobody looks on, with a line for each."""
    slices = f"{request.num_slices} x " if request.num_slices > 1 else ""
    of_size = f", size {request.size}" if request.size else ""
    where = f"{slices}{request.topology}{of_size}, batch {request.count or request.config.train.global_batch_size}"
    console, begin, last = Console(file=log.stream), time.monotonic(), ""
    if console.is_terminal:
        with console.status(where) as status:
            return compile_step(
                request, lambda phase: status.update(f"{where}: {phase} ({time.monotonic() - begin:.0f} s)")
            )

    def once(phase: str) -> None:
        nonlocal last
        if phase != last:
            log.write(f"{where}: {phase}\n")
        last = phase

    return compile_step(request, once)


def _search(request: Request, found: Plan) -> dict[str, Any]:
    """The largest global batch that fits, 0 where the smallest does not, and the bytes that it takes of a device.

    Only batches that can be run are measured: as many examples for each share of the batch, at each time that gradients
    are accumulated. Devices that differ in `tensor` alone have the same share.
    """
    shares = found["mesh"]["data"] * found["mesh"]["fsdp"] * request.config.train.accumulate_steps
    memory = found["bytes_per_device"]
    fixed = sum(memory[each] for each in ("params", "opt_state", "ema_params", "frozen"))

    def total(batch: int) -> int:
        config = request.config.copy_and_resolve_references()
        config.train.global_batch_size = batch * shares
        count = batch * shares if request.size else None
        other = replace(request, config=config, is_full=False, count=count)
        return estimate(other, _compile(other))["bytes_per_device"]["total"]

    first = found["global_batch_size"] // shares  # a multiple, or there were no plan
    batch, needs = largest_batch(total, memory["hbm"], first, memory["total"], fixed)
    return {
        "global_batch_size": batch * shares,
        "batch_per_device": batch * shares / found["devices"],
        "total": needs,
    }
