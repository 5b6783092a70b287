"""The report's figures, drawn with matplotlib at print quality; brightness is 0 for black and 1 for white."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from offsetjax.report import article
from offsetjax.report.numbers import Numbers

WIDTH = 8.0  # inches; 1,280 pixels
_COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#8C6D31"),
    *("#332288", "#117733", "#882255", "#666666"),
)
_GREY, _INK = "#8A8A8A", "#222222"
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
    "figure.dpi": 160,
    "savefig.dpi": 160,
}
style = matplotlib.rc_context(_STYLE)


def colour(index: int) -> str:
    """The colour of the arm or prompt at `index`, the same in every figure."""
    return _COLOURS[index % len(_COLOURS)]


def prompt_label(prompt: str, width: int = 60) -> str:
    """A prompt as text on a figure: `$` would begin mathematics."""
    short = textwrap.shorten(prompt, width, placeholder="…")
    short = short if short != "…" else f"{prompt[: width - 1]}…"  # one long word, as a run's name is
    return short.replace("$", r"\$") or "(no prompt)"


def all_prompts(arms: Sequence[Numbers]) -> list[str]:
    """Every prompt of the arms' last samples, `in_order`."""
    return in_order(prompt for arm in arms if arm["after"] for prompt in arm["after"]["prompts"])


def in_order(prompts: Iterable[str]) -> list[str]:
    """The prompts once each: the article's from dark to bright, then the others as they come."""
    order = [figure.key for figure in article.FIGURES]

    def place(prompt: str) -> int:
        figure = article.figure_for(prompt)
        return order.index(figure.key) if figure else len(order)

    return sorted(dict.fromkeys(prompts), key=place)


@style
def brightness(arms: Sequence[Numbers]) -> Figure | None:
    """A row a prompt and arm: before (ring) → after (dot ± std), the data's mean ± std as a band, the article's too."""
    rows: list[tuple[str, str, Numbers | None, Numbers, Numbers | None, str]] = []
    heads: list[tuple[int, str]] = []
    for prompt in all_prompts(arms):
        heads.append((len(rows) + len(heads), prompt))
        figure = article.figure_for(prompt)
        if figure:
            rows.append(("the article", prompt, {"mean": figure.before}, {"mean": figure.after}, None, _GREY))
        for index, arm in enumerate(arms):
            if arm["after"] and (after := arm["after"]["prompts"].get(prompt)):
                before = arm["before"]["prompts"].get(prompt) if len(arm["samples"]) > 1 else None
                data = arm["data"].get("prompts", {}).get(prompt)
                rows.append((arm["name"], prompt, before, after, data, colour(index)))
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
    axes.set_title("○ before   ● after, ± deviation over seeds   ▒ the training data, ± deviation")
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
def curves(arms: Sequence[Numbers]) -> Figure | None:
    """The brightness of each prompt over the steps, ± standard deviation over seeds: a panel an arm."""
    shown = [arm for arm in arms if len(arm["samples"]) > 1]
    if not shown:
        return None
    prompts = all_prompts(shown)
    canvas, panels = facets(len(shown), 2.4)
    for axes, arm in zip(panels, shown, strict=True):
        for index, prompt in enumerate(prompts):
            points = [(each["step"], found) for each in arm["samples"] if (found := each["prompts"].get(prompt))]
            if not points:
                continue
            steps, mean = [step for step, _ in points], np.array([found["mean"] for _, found in points])
            std = np.array([found["std"] for _, found in points])
            axes.fill_between(steps, mean - std, mean + std, color=colour(index), alpha=0.12, lw=0)
            axes.plot(steps, mean, "o-", ms=2.5, lw=1.4, color=colour(index), label=prompt_label(prompt, 44))
        axes.set(ylim=(-0.02, 1.02), xlabel="step", ylabel="mean brightness", title=_arm_title(arm))
        axes.grid(color="#EEEEEE")
    entries = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    canvas.legend(list(entries.values()), list(entries), loc="outside lower left", ncols=2)
    return canvas


def _arm_title(arm: Numbers) -> str:
    return f"{prompt_label(arm['name'], 34)}, {arm['noise']}"


@style
def unconditional_spread(arms: Sequence[Numbers]) -> Figure | None:
    """The standard deviation of brightness for no prompt: a bar a start noise, beside the training data's."""
    shown = [arm for arm in arms if any(each["count"] > 1 for each in arm["unconditional"].values())]
    if not shown:
        return None
    rows: list[tuple[str, float, str]] = []
    for arm in shown:
        shade = colour(list(arms).index(arm))
        for start, each in sorted(arm["unconditional"].items(), reverse=True):
            if each["count"] > 1:
                rows.append((f"{prompt_label(arm['name'], 30)}, {start} start", each["std"], shade))
        if "brightness" in arm["data"]:
            rows.append((f"{prompt_label(arm['name'], 30)}, its data", arm["data"]["brightness"]["std"], "#C8C8C8"))
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
