"""From a compiled step to a plan: memory, FLOPs, traffic, and an estimate of the time, with what it assumes.

    roofline = Σ over operations of max(FLOPs / peak, bytes / HBM bandwidth)
    time over ICI = bytes that a device sends / bandwidth of the links along the axes that the group spans
    time over DCN = bytes that a device sends / its share of its host's network

No operation can be faster than its roofline, and no step faster than the largest of the three; if nothing is hidden
behind anything else, they add up. Where a bandwidth is not known, how slow a step may be is not known either. MFU is
the model's FLOPs, recomputation left out, over the step's time at peak.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from offsetjax.errors import UserError, one_line
from offsetjax.parallel.chips import Chip, chip_of
from offsetjax.plan.compile import Compiled, Request
from offsetjax.plan.costs import Collective, Work, read_program

ASSUMPTIONS = (
    "the fastest step hides all traffic between chips behind computing, the slowest none of it",
    "each operation runs at its roofline: at the peak of bfloat16, or at the whole bandwidth of HBM",
    "a float32 product counts as the bfloat16 products that its precision takes",
    "collectives use every link along the axes that their devices span: two where that is a closed ring, else one",
    "input and checkpoints keep up with the steps",
)

Plan = dict[str, Any]


class Seconds(NamedTuple):
    """One step's parts, in seconds; None is not known."""

    matrix: float | None
    hbm: float | None
    roofline: float | None
    ici: float | None
    dcn: float | None
    cycles: float | None


def estimate(request: Request, compiled: Compiled) -> Plan:
    """The plan of one topology, ready for JSON."""
    facts, chip = compiled.facts, chip_of(compiled.facts["device_kind"])
    kernels = {(name, tuple(map(tuple, shapes))): flops for name, shapes, flops in facts["kernels"]}
    try:
        work, exchanged = read_program(compiled.hlo, kernels) if compiled.hlo else ([], [])
    except ValueError as error:
        raise UserError(
            f"plan: the compiled program cannot be read ({one_line(error)}); take the libtpu of launch/constraints.txt"
        ) from error
    seconds = _seconds(work, exchanged, facts, request, chip) if work else Seconds(*(None,) * 6)
    devices = facts["num_devices"]
    chips = devices // (chip.devices_per_chip if chip else 1)
    return {
        "topology": request.topology,
        "num_slices": request.num_slices,
        "chips": chips,
        "devices": devices,
        "mesh": facts["mesh"],
        "global_batch_size": facts["global_batch_size"],
        "batch_per_device": facts["global_batch_size"] / devices,
        "parameters": {"trained": facts["trained_parameters"], "frozen": facts["frozen_parameters"]},
        "bytes_per_device": _memory(compiled, chip),
        "checkpoint_bytes": facts["checkpoint_bytes_in_all"],
        "optimizer_bytes_a_parameter": facts["opt_state_bytes_in_all"] / max(1, facts["trained_parameters"]),
        "flops_per_device": {
            "model": facts["model_flops"] / devices,
            "compiled": sum(each.flops * each.times for each in work),
        },
        "hbm_traffic_bytes": sum(each.hbm_bytes * each.times for each in work),
        "collectives": _by_kind(exchanged),
        "seconds": seconds._asdict(),
        "seconds_by_part": _by_part(work, facts["parts"], chip),
        **_rates(facts, seconds, chip, chips),
        "assumptions": list(ASSUMPTIONS),
        "compiled": {
            "is_full": request.is_full,
            "seconds": compiled.seconds,
            "is_cached": compiled.is_cached,
            "program": facts["key"],
            "versions": dict(zip(("jax", "jaxlib", "libtpu"), facts["versions"], strict=True)),
        },
    }


def _memory(compiled: Compiled, chip: Chip | None) -> dict[str, Any]:
    facts = compiled.facts
    kept = {
        "params": facts["params_bytes"],
        "opt_state": facts["opt_state_bytes"],
        "ema_params": facts["ema_params_bytes"],
        "frozen": facts["frozen_bytes"] + facts["idle_bytes"],
        "batch": facts["batch_bytes"],
    }
    total = compiled.hbm_bytes + facts["idle_bytes"]
    limit = compiled.hbm_limit_bytes or (int(chip.hbm_bytes) if chip else None)
    fits = None if limit is None else compiled.hbm_limit_bytes is None and total <= limit
    temporary = max(0, total - sum(kept.values()))
    return {**kept, "temporary": temporary, "total": total, "hbm": limit, "fits": fits}


def _by_kind(exchanged: Iterable[Collective]) -> list[dict[str, Any]]:
    totals: dict[tuple[str, str, int], list[int]] = defaultdict(lambda: [0, 0])
    for each in exchanged:
        total = totals[each.kind, "dcn" if each.is_dcn else "ici", len(each.group)]
        total[0] += each.times
        total[1] += each.times * each.num_bytes
    return [
        {"kind": kind, "over": over, "devices": devices or None, "count": count, "bytes": num_bytes}
        for (kind, over, devices), (count, num_bytes) in sorted(totals.items(), key=lambda item: -item[1][1])
    ]


def _seconds(
    work: Sequence[Work], exchanged: Sequence[Collective], facts: dict[str, Any], request: Request, chip: Chip | None
) -> Seconds:
    if chip is None:
        return Seconds(*(None,) * 6)
    ici = dcn = 0.0
    for each in exchanged:
        if each.is_dcn:
            dcn += each.times * _sent(each, request.num_slices)
        elif len(each.group) > 1:
            links = _bandwidth(each.group, facts["coordinates"], chip)
            ici += each.times * _sent(each, len(each.group)) / links
    cycles = [each.times * each.cycles for each in work if each.cycles is not None]
    return Seconds(
        matrix=sum(each.times * each.flops * each.passes for each in work) / chip.peak_flops,
        hbm=sum(each.times * each.hbm_bytes for each in work) / chip.hbm_bandwidth,
        roofline=sum(each.times * _roofline(each, chip) for each in work),
        ici=ici,
        dcn=dcn / chip.dcn_bandwidth if chip.dcn_bandwidth else (None if dcn else 0.0),
        cycles=sum(cycles) / chip.clock_hz if cycles and chip.clock_hz else None,
    )


def _roofline(work: Work, chip: Chip) -> float:
    return max(work.flops * work.passes / chip.peak_flops, work.hbm_bytes / chip.hbm_bandwidth)


def _sent(exchange: Collective, parties: int) -> float:
    """Bytes that each device sends, by the usual algorithms on a ring of so many parties."""
    others = (parties - 1) / parties
    factor = {"all-reduce": 2 * others, "collective-permute": 1.0}.get(exchange.kind, others)
    return factor * exchange.num_bytes


def _bandwidth(group: tuple[int, ...], coordinates: list[list[int]], chip: Chip) -> float:
    """Bytes a second that a device can send within a group: two ways along an axis that it closes to a ring."""
    link = (chip.ici_bandwidth or 0.0) / max(1, chip.ici_links)
    places = [coordinates[device] for device in group if device < len(coordinates)]
    sizes = [max(axis) + 1 for axis in zip(*coordinates, strict=True)]
    ways = 0
    for axis, (size, is_closed) in enumerate(zip(sizes, _closed(sizes, chip), strict=True)):
        extent = len({place[axis] for place in places})
        if extent > 1:
            ways += 2 if is_closed and extent == size else 1
    return link * max(1, ways)


def _closed(sizes: list[int], chip: Chip) -> list[bool]:
    """Whether links lead from one end of each axis of a slice to the other.

    Those of a v5e or v6e are a pod's own, whose axes are 16 long. Those of the others are made by optical switches,
    which join the faces of cubes of 4x4x4: a slice of less than a cube has none (jax-ml.github.io/scaling-book/tpus).
    """
    if chip.ici_links == 4:
        return [size == 16 for size in sizes]
    return [all(size % 4 == 0 for size in sizes)] * len(sizes)


def _by_part(work: Sequence[Work], parts: Sequence[str], chip: Chip | None) -> dict[str, float]:
    """The roofline by the part of the model and its pass, from the names that operations carry."""
    if chip is None:
        return {}
    seconds: dict[str, float] = defaultdict(float)
    for each in work:
        seconds[_part(each.instruction.attributes, parts)] += each.times * _roofline(each, chip)
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def _part(attributes: str, parts: Sequence[str]) -> str:
    """The part that an operation belongs to, and in which pass, by the name that jax gives it (`pipeline.Named`)."""
    name = re.search(r'op_name="([^"]*)"', attributes)
    # The outermost: a layer may be called as another part is.
    found = re.search(rf"[/(]({'|'.join(map(re.escape, parts))})[)/]", name[1]) if name and parts else None
    if name is None or found is None:
        return "other"
    part = found[1]
    # By jax.checkpoint, or in the backward pass of a loop.
    if re.search(r"rematted_computation|transpose\(.*/while/body/(closed_call/)?jvp\(", name[1]):
        return f"{part} again"
    return f"{part} {'backward' if 'transpose(' in name[1] else 'forward'}"


def _rates(facts: dict[str, Any], seconds: Seconds, chip: Chip | None, chips: int) -> dict[str, Any]:
    """From the fastest step to the slowest, None where that is not known; not below the compiler's own estimate."""
    if seconds.roofline is None or chip is None:
        return {}
    computing = max(seconds.roofline, seconds.cycles or 0.0)
    between = [each for each in (seconds.ici, seconds.dcn) if each is not None]
    is_whole = None not in (seconds.ici, seconds.dcn)
    steps = max([computing, *between]), computing + math.fsum(between) if is_whole else None
    peak = chip.peak_flops * facts["num_devices"]
    return {
        "step_seconds": list(steps),
        "images_per_second": [each and facts["global_batch_size"] / each for each in steps],
        "mfu": [each and facts["model_flops"] / (each * peak) for each in steps],
        "hours": [each and facts["steps"] * each / 3600 for each in steps],
        "chip_hours": [each and facts["steps"] * each * chips / 3600 for each in steps],
    }
