"""Runs that differ in their seed alone are one experiment, done several times: they are shown as one."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from offsetjax.config import is_indifferent
from offsetjax.report.read import Run, Samples


@dataclass(frozen=True)
class Curve:
    """A value over the steps that all runs have logged: its mean over the runs, the lowest and the highest."""

    steps: Int[np.ndarray, " n"]
    mean: Float[np.ndarray, " n"]
    low: Float[np.ndarray, " n"]
    high: Float[np.ndarray, " n"]


@dataclass(frozen=True)
class Pool:
    """At least one run; `combined` stands for all of them, with the config, the pictures and the data of the first.

    Its metrics are means over the runs, its samples the records of all runs.
    """

    name: str
    runs: tuple[Run, ...]
    combined: Run

    @property
    def first(self) -> Run:
        """The run whose pictures are shown, by the name that all share."""
        run = next((run for run in self.runs if run.steps), self.runs[0])
        return replace(run, name=_common_name([run.name for run in self.runs]))

    def curve(self, field: str) -> Curve | None:
        """A field of the metrics; None where no step has it in all runs that have it at all."""
        series = [found for run in self.runs if (found := _values([*run.metrics, *run.evaluations], field))]
        steps = sorted(set.intersection(*map(set, series))) if series else []
        if not steps:
            return None
        values = np.array([[each[step] for step in steps] for each in series])
        return Curve(np.array(steps), values.mean(0), values.min(0), values.max(0))


def pool(runs: Sequence[Run]) -> list[Pool]:
    """The runs in their order, those that differ in the config's `seed` alone (and in what is indifferent) together."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        fields = [each for each in run.config.items() if each[0] != "seed" and not is_indifferent(each[0])]
        groups.setdefault(repr(sorted(fields)), []).append(run)
    pools = []
    for same in groups.values():
        has_seeds = len({run.config.get("seed") for run in same}) == len(same)
        pools += [_pool(same)] if has_seeds else [_pool([run]) for run in same]
    return pools


def _pool(runs: Sequence[Run]) -> Pool:
    if len(runs) == 1:
        return Pool(runs[0].name, tuple(runs), runs[0])
    name = f"{_common_name([run.name for run in runs])} ({len(runs)} seeds)"
    combined = replace(
        runs[0],
        name=name,
        metrics=_mean_lines([run.metrics for run in runs]),
        evaluations=[],  # curves are taken from the runs
        steps=_join([run.steps for run in runs]),
        others=_join([run.others for run in runs]),
    )
    return Pool(name, tuple(runs), combined)


def _common_name(names: Sequence[str]) -> str:
    """`offset_strength=0.1,seed=0` and `…,seed=1` → `offset_strength=0.1`; the first where nothing is shared."""
    without = {re.sub(r",?\bseed=\d+", "", name).strip(",/") for name in names}
    base = without.pop() if len(without) == 1 else ""
    return base or names[0]


def _values(lines: Sequence[Mapping[str, float]], field: str) -> dict[int, float]:
    return {int(line["step"]): line[field] for line in lines if field in line and np.isfinite(line[field])}


def _mean_lines(runs: Sequence[Sequence[Mapping[str, float]]]) -> list[dict[str, float]]:
    """The mean of each field at each step that all runs with any have logged."""
    by_step = [{int(line["step"]): line for line in lines} for lines in runs if lines]
    steps = sorted(set.intersection(*map(set, by_step))) if by_step else []
    return [
        {field: float(np.mean([lines[step][field] for lines in by_step])) for field in _fields(by_step, step)}
        for step in steps
    ]


def _fields(by_step: Sequence[Mapping[int, Mapping[str, float]]], step: int) -> Iterator[str]:
    return (field for field in by_step[0][step] if all(field in lines[step] for lines in by_step))


def _join(runs: Sequence[Sequence[Samples]]) -> list[Samples]:
    """The samples of the same name, prompts and settings in all runs that have any, their records together."""
    drawn = [{samples.name: samples for samples in run} for run in runs if run]
    joined = []
    for name, first in drawn[0].items() if drawn else ():
        same = [run[name] for run in drawn if name in run and _is_alike(run[name], first)]
        if len(same) == len(drawn):
            joined.append(replace(first, records=tuple(record for each in same for record in each.records)))
    return joined


def _is_alike(one: Samples, other: Samples) -> bool:
    def what(samples: Samples) -> tuple[Any, ...]:
        return samples.step, samples.prompts, samples.setting

    return what(one) == what(other)
