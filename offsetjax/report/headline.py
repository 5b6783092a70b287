"""The headline picture: a row a prompt, a column a training, before and after."""

import textwrap
from collections import Counter
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from offsetjax.plots import prompt_label, style
from offsetjax.report.numbers import noise_name
from offsetjax.report.read import Run, Samples, read_picture

SEEDS = 2  # pictures of each prompt that are shown
COLUMNS = 5  # of one block; the first is "before"


def cells(samples: Samples) -> dict[str, list[Image.Image]]:
    """Cuts a grid into `{prompt: its pictures}`; empty if there is none, or none whose places are known."""
    if samples.picture is None or not samples.has_places:
        return {}
    image = read_picture(samples.picture)
    pictures: dict[str, list[Image.Image]] = {}
    for record in samples.records:
        pictures.setdefault(record.prompt, []).append(image.crop(record.box))
    return pictures


def _short(noise: str) -> str:
    """A noise in no more letters than a column is wide."""
    return prompt_label(noise.replace("offset_strength", "offset"), 18)


def _wrapped(name: str) -> str:
    """A run's name, a line for as many of a point's fields as a column is wide."""
    lines = textwrap.wrap(name.replace(",", ", "), 24, max_lines=3, placeholder="…")
    return "\n".join(lines).replace("$", r"\$")


def _columns(runs: Sequence[Run]) -> tuple[list[str], list[tuple[str, Samples]]]:
    """The prompts that most runs share, and the columns: the first run before, then each run after."""
    shown = [run for run in runs if run.steps and run.steps[-1].has_places]
    if not shown:
        return [], []
    prompts = Counter(run.steps[-1].prompts for run in shown).most_common(1)[0][0]
    alike = [run for run in shown if set(prompts) <= set(run.steps[-1].prompts)]
    columns = [
        (
            f"{_wrapped(run.name)}\n{_short(noise_name(run.config))}, step {run.steps[-1].step}",
            run.steps[-1],
        )
        for run in alike
    ]
    first = alike[0].steps[0]
    if len(alike[0].steps) > 1 and first.has_places and set(prompts) <= set(first.prompts):
        is_shared = all(run.steps[0].records == first.records for run in alike)
        name = "before training" if is_shared else "before (of the next)"
        columns.insert(0, (f"{name}\nstep {first.step}", first))
    return list(prompts), columns


@style
def headline(runs: Sequence[Run]) -> Figure | None:
    """The same seeds of each prompt, before and after each training, the mean brightness of all seeds below."""
    prompts, columns = _columns(runs)
    if not columns:
        return None
    blocks = [columns[begin : begin + COLUMNS] for begin in range(0, len(columns), COLUMNS)]
    cut = {id(samples): cells(samples) for _, samples in columns}
    seeds = min(SEEDS, min(len(pictures[prompt]) for pictures in cut.values() for prompt in prompts))
    wide = len(blocks[0])
    cell = min(1.9, (9.6 - 0.1) / wide)
    titles = 0.25 + 0.15 * max(title.count("\n") + 1 for title, _ in columns)  # inches, with the first prompt
    height = titles + len(prompts) * (cell / seeds + 0.34)
    canvas = Figure(figsize=(cell * wide, len(blocks) * height))
    parts = canvas.subfigures(len(blocks), 1, squeeze=False)[:, 0]
    for part, block in zip(parts, blocks, strict=True):
        grid = part.subplots(len(prompts), wide, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for row, prompt in enumerate(prompts):
            for column, (title, samples) in enumerate(block):
                strip = [np.asarray(picture.resize((128, 128))) for picture in cut[id(samples)][prompt][:seeds]]
                _show(grid[row, column], strip, float(np.mean(samples.brightness(prompt))))
                if row == 0:
                    grid[row, column].set_title(title, size=8.5, weight="bold", pad=16)
            grid[row, 0].text(0, 1.03, prompt_label(prompt, 80), ha="left", va="bottom", size=8)
        part.subplots_adjust(left=0.005, right=0.995, top=1 - titles / height, bottom=0.04, wspace=0.03, hspace=0.12)
    return canvas


def _show(axes: Axes, strip: Sequence[np.ndarray], mean: float) -> None:
    axes.imshow(np.concatenate(strip, axis=1), extent=(0, len(strip), 0, 1), interpolation="none")
    axes.text(len(strip), -0.03, f"{mean:.2f}", ha="right", va="top", size=8, color="#555555")
