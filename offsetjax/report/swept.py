"""The figure of a sweep: the brightness of each prompt against the field that the runs differ in."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from offsetjax.config import is_indifferent
from offsetjax.plots import colour, prompt_label, style
from offsetjax.report.figures import facets
from offsetjax.report.numbers import config_differences, noise_name, prompt_range, prompts_in_data, spread
from offsetjax.report.pool import Pool

_LOGARITHMIC = 10  # times as large: from here on the values are spread by their logarithm


@dataclass(frozen=True)
class Series:
    """Pools that differ in one field of the config alone, in the order of its values."""

    field: str
    others: dict[str, Any]  # the other fields in which the runs of a report differ
    values: tuple[float, ...]
    pools: tuple[Pool, ...]


def find_series(pools: Sequence[Pool]) -> list[Series]:
    """The series of one field, that in which most pools have a place; none where no two pools differ in one alone.

    Only pools with samples of the last step that any of them has are compared.
    """
    sampled = [each for each in pools if each.combined.steps]
    last = max((each.combined.steps[-1].step for each in sampled), default=0)
    sampled = [each for each in sampled if each.combined.steps[-1].step == last]
    differences = config_differences([each.combined for each in sampled])
    differences = {field: each for field, each in differences.items() if field != "seed" and not is_indifferent(field)}
    numeric = [field for field, values in differences.items() if all(_is_number(value) for value in values)]
    found = [_series_of(field, differences, sampled) for field in numeric]
    return max(found, key=lambda each: sum(len(series.pools) for series in each), default=[])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _series_of(field: str, differences: dict[str, list[Any]], pools: Sequence[Pool]) -> list[Series]:
    others = [other for other in differences if other != field]
    groups: dict[str, list[int]] = {}
    for index in range(len(pools)):
        groups.setdefault(repr([differences[other][index] for other in others]), []).append(index)
    return [
        Series(
            field,
            {other: differences[other][group[0]] for other in others},
            tuple(differences[field][index] for index in ordered),
            tuple(pools[index] for index in ordered),
        )
        for group in groups.values()
        if len(group) > 1
        for ordered in [sorted(group, key=lambda index: differences[field][index])]
    ]


def sentences(found: Sequence[Series]) -> Iterator[str]:
    """How far the prompts' brightness reaches at each value of a series."""
    for series in found:
        ranges = []
        for each in series.pools:
            last = each.combined.steps[-1]
            width = prompt_range({prompt: spread(last.brightness(prompt)) for prompt in last.prompts})
            ranges.append(width[2] if width else None)
        known = [width for width in ranges if width is not None]
        if len(known) < len(ranges):
            continue
        others = "".join(f", {field} {value}" for field, value in series.others.items())
        reached = ", ".join(f"{width:.2f}" for width in known)
        values = ", ".join(f"{value:g}" for value in series.values)
        yield (
            f"{series.field} {values}{others}: the range of the prompts' mean brightness is {reached}; "
            f"it is widest at {series.values[known.index(max(known))]:g}."
        )


@style
def swept(found: Sequence[Series]) -> Figure | None:
    """A panel a series: the mean of each prompt in each run, their mean as a line, the data's as dashes."""
    lasts = [each.combined.steps[-1] for series in found for each in series.pools]
    prompts = list(dict.fromkeys(prompt for samples in lasts for prompt in samples.prompts))
    if not prompts:
        return None
    canvas, panels = facets(len(found), 2.5)
    varied = [field for field in found[0].others if len({repr(series.others[field]) for series in found}) > 1]
    for axes, series in zip(panels, found, strict=True):
        for index, prompt in enumerate(prompts):
            _draw(axes, series, prompt, index)
        names = ", ".join(f"{field.rsplit('.', 1)[-1]} {series.others[field]}" for field in varied)
        axes.set(ylim=(-0.02, 1.02), xlabel=series.field, ylabel="mean brightness")
        axes.set_title(prompt_label(names or _title(series), 60))
        _place(axes, series.values)
        axes.grid(color="#EEEEEE")
    entries = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    canvas.legend(list(entries.values()), list(entries), loc="outside lower left", ncols=2)
    return canvas


def _title(series: Series) -> str:
    step = series.pools[0].combined.steps[-1].step
    noise = {noise_name(each.combined.config) for each in series.pools}
    return f"Step {step}" + (f", {noise.pop()}" if len(noise) == 1 else "")


def _draw(axes: Axes, series: Series, prompt: str, index: int) -> None:
    """Each run's mean of a prompt as a dot, and the line of their means."""
    means = []
    for value, each in zip(series.values, series.pools, strict=True):
        drawn = [run.steps[-1].brightness(prompt) for run in each.runs if run.steps]
        runs = [float(np.mean(brightness)) for brightness in drawn if brightness]
        if not runs:
            continue
        means.append((value, float(np.mean(runs))))
        axes.plot([value] * len(runs), runs, "o", ms=4, mew=0, alpha=0.6, color=colour(index))
    if means:
        axes.plot(*zip(*means, strict=True), lw=1.5, color=colour(index), label=prompt_label(prompt, 50))
    if data := prompts_in_data(series.pools[0].combined).get(prompt):
        axes.axhline(data["mean"], color=colour(index), lw=0.9, ls=(0, (2, 3)), zorder=0)


def _place(axes: Axes, values: Sequence[float]) -> None:
    if min(values) > 0 and max(values) / min(values) >= _LOGARITHMIC:
        axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(values)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{value:g}" for value in values])
