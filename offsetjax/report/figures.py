"""The report's figures, drawn with matplotlib at print quality; brightness is 0 for black and 1 for white."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from offsetjax.plots import GREY, WIDTH, colour, prompt_label, style
from offsetjax.report.numbers import Numbers
from offsetjax.report.section import Reference


def all_prompts(runs: Sequence[Numbers]) -> list[str]:
    """Every prompt of the runs' last samples, once each, as they come."""
    return list(dict.fromkeys(prompt for run in runs if run["after"] for prompt in run["after"]["prompts"]))


@style
def brightness(runs: Sequence[Numbers], references: Mapping[str, Sequence[Reference]]) -> Figure | None:
    """A row a prompt and run: before (ring) → after (dot ± std), the data's mean ± std as a band.

    Args:
        runs: their summaries.
        references: what others reported for a prompt, each in a row of its own.
    """
    rows: list[tuple[str, str, Numbers | None, Numbers, Numbers | None, str]] = []
    heads: list[tuple[int, str]] = []
    for prompt in all_prompts(runs):
        heads.append((len(rows) + len(heads), prompt))
        rows += [
            (each.source, prompt, {"mean": each.before}, {"mean": each.after}, None, GREY)
            for each in references.get(prompt, ())
        ]
        for index, run in enumerate(runs):
            if run["after"] and (after := run["after"]["prompts"].get(prompt)):
                before = run["before"]["prompts"].get(prompt) if len(run["samples"]) > 1 else None
                data = run["data"].get("prompts", {}).get(prompt)
                rows.append((run["name"], prompt, before, after, data, colour(index)))
    if not rows:
        return None
    count = len(rows) + len(heads)
    canvas = Figure(figsize=(WIDTH, 0.9 + 0.235 * count), layout="constrained")
    axes = canvas.add_subplot()
    places = [place for place in range(count) if place not in dict(heads)]
    for place, prompt in heads:
        axes.text(0.0, place + 0.1, prompt_label(prompt), weight="bold", va="center")
    for place, (_, _, before, after, data, shade) in zip(places, rows, strict=True):
        if data:
            left, right = max(0.0, data["mean"] - data["std"]), min(1.0, data["mean"] + data["std"])
            axes.barh(place, right - left, 0.72, left, color="#E4E4E4", zorder=0)
            axes.plot([data["mean"]] * 2, [place - 0.36, place + 0.36], color="#B0B0B0", lw=1.2, zorder=1)
        if before:
            axes.plot([before["mean"], after["mean"]], [place] * 2, color=shade, lw=1, alpha=0.5, zorder=2)
            axes.plot(before["mean"], place, "o", ms=5, mfc="white", mec=shade, zorder=3)
        if after.get("count", 1) > 1:
            axes.errorbar(after["mean"], place, xerr=after["std"], color=shade, lw=2.2, alpha=0.35, zorder=2)
        axes.plot(after["mean"], place, "o", ms=6, color=shade, zorder=4)
    axes.set_yticks(places, [prompt_label(row[0], 34) for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.set(ylim=(count - 0.4, -0.6), xlim=(-0.02, 1.02), xlabel="mean brightness (0 black, 1 white)")
    axes.grid(axis="x", color="#EEEEEE", zorder=-1)
    axes.set_title("○ before   ● after ± std over seeds   ▒ the training data ± std")
    return canvas


def facets(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, two a row."""
    columns = min(count, 2)
    canvas = Figure(figsize=(WIDTH, height * math.ceil(count / columns) + 0.5), layout="constrained")
    grid = canvas.subplots(math.ceil(count / columns), columns, squeeze=False, sharey=True)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    return canvas, list(grid.flat[:count])


@style
def curves(runs: Sequence[Numbers]) -> Figure | None:
    """The brightness of each prompt over the steps, ± standard deviation over seeds: a panel a run."""
    shown = [run for run in runs if len(run["samples"]) > 1]
    if not shown:
        return None
    prompts = all_prompts(shown)
    canvas, panels = facets(len(shown), 2.4)
    for axes, run in zip(panels, shown, strict=True):
        for index, prompt in enumerate(prompts):
            points = [(each["step"], found) for each in run["samples"] if (found := each["prompts"].get(prompt))]
            if not points:
                continue
            steps, mean = [step for step, _ in points], np.array([found["mean"] for _, found in points])
            std = np.array([found["std"] for _, found in points])
            axes.fill_between(steps, mean - std, mean + std, color=colour(index), alpha=0.12, lw=0)
            axes.plot(steps, mean, "o-", ms=2.5, lw=1.4, color=colour(index), label=prompt_label(prompt, 44))
        axes.set(ylim=(-0.02, 1.02), xlabel="step", ylabel="mean brightness", title=_run_title(run))
        axes.grid(color="#EEEEEE")
    entries = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    canvas.legend(list(entries.values()), list(entries), loc="outside lower left", ncols=2)
    return canvas


def _run_title(run: Numbers) -> str:
    return f"{prompt_label(run['name'], 34)}, {run['noise']}"


@style
def unconditional_spread(runs: Sequence[Numbers]) -> Figure | None:
    """The standard deviation of brightness for no prompt: a bar a start noise, beside the training data's."""
    shown = [run for run in runs if any(each["count"] > 1 for each in run["unconditional"].values())]
    if not shown:
        return None
    rows: list[tuple[str, float, str]] = []
    for run in shown:
        shade = colour(list(runs).index(run))
        for start, each in sorted(run["unconditional"].items(), reverse=True):
            if each["count"] > 1:
                rows.append((f"{prompt_label(run['name'], 30)}, {start} start", each["std"], shade))
        if "brightness" in run["data"]:
            rows.append((f"{prompt_label(run['name'], 30)}, its data", run["data"]["brightness"]["std"], "#C8C8C8"))
    canvas = Figure(figsize=(WIDTH, 0.6 + 0.3 * len(rows)), layout="constrained")
    axes = canvas.add_subplot()
    places = range(len(rows))
    axes.barh(places, [value for _, value, _ in rows], 0.66, color=[shade for *_, shade in rows])
    for place, (_, value, _) in enumerate(rows):
        axes.text(value, place, f" {value:.3f}", va="center")
    axes.set_yticks(places, [label for label, *_ in rows])
    axes.tick_params(axis="y", length=0)
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel="standard deviation of brightness")
    axes.margins(x=0.1)
    return canvas


@style
def seconds(runs: Sequence[Numbers]) -> Figure | None:
    """What share of its wall clock each run spent on what: a bar a run, from steps to what is lost."""
    shown = [run for run in runs if sum(run["seconds"].values()) > 0]
    if not shown:
        return None
    first = [*shown[0]["seconds"]]
    kinds = ["step", *(kind for kind in first if kind != "step")]  # what a run is for comes first
    canvas = Figure(figsize=(WIDTH, 0.9 + 0.3 * len(shown)), layout="constrained")
    axes = canvas.add_subplot()
    lefts = np.zeros(len(shown))
    for index, kind in enumerate(kinds):
        shares = np.array([100 * run["seconds"][kind] / sum(run["seconds"].values()) for run in shown])
        if shares.any():
            axes.barh(range(len(shown)), shares, 0.66, lefts, color=colour(index), label=kind)
            lefts += shares
    for place, run in enumerate(shown):
        share = run["seconds"]["step"] / sum(run["seconds"].values())
        axes.text(1, place, f"{share:.0%}", va="center", color="white", weight="bold")
    axes.set_yticks(range(len(shown)), [prompt_label(run["name"], 34) for run in shown])
    axes.tick_params(axis="y", length=0)
    axes.set(ylim=(len(shown) - 0.4, -0.6), xlim=(0, 100), xlabel="% of the wall clock")
    canvas.legend(loc="outside lower left", ncols=len(kinds))
    return canvas
