"""The headline picture: a row a prompt, a column a training, before and after."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from offsetjax.report.figures import in_order, prompt_label, style
from offsetjax.report.numbers import noise_name
from offsetjax.report.read import Arm, Samples, read_picture

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


def _columns(arms: Sequence[Arm]) -> tuple[list[str], list[tuple[str, Samples]]]:
    """The prompts that most arms share, and the columns: the first arm before, then each arm after."""
    shown = [arm for arm in arms if arm.steps and arm.steps[-1].has_places]
    if not shown:
        return [], []
    prompts = Counter(arm.steps[-1].prompts for arm in shown).most_common(1)[0][0]
    alike = [arm for arm in shown if set(prompts) <= set(arm.steps[-1].prompts)]
    columns = [
        (
            f"{prompt_label(arm.name, 24)}\n{_short(noise_name(arm.config))}, step {arm.steps[-1].step}",
            arm.steps[-1],
        )
        for arm in alike
    ]
    first = alike[0].steps[0]
    if len(alike[0].steps) > 1 and first.has_places and set(prompts) <= set(first.prompts):
        is_shared = all(arm.steps[0].records == first.records for arm in alike)
        name = "before training" if is_shared else f"before: {prompt_label(alike[0].name, 16)}"
        columns.insert(0, (f"{name}\nstep {first.step}", first))
    return in_order(prompts), columns


@style
def headline(arms: Sequence[Arm]) -> Figure | None:
    """The same seeds of each prompt, before and after each training, the mean brightness of all seeds below."""
    prompts, columns = _columns(arms)
    if not columns:
        return None
    blocks = [columns[begin : begin + COLUMNS] for begin in range(0, len(columns), COLUMNS)]
    cut = {id(samples): cells(samples) for _, samples in columns}
    seeds = min(SEEDS, min(len(pictures[prompt]) for pictures in cut.values() for prompt in prompts))
    wide = len(blocks[0])
    cell = min(1.9, (9.6 - 0.1) / wide)
    canvas = Figure(figsize=(cell * wide, len(blocks) * (0.5 + len(prompts) * (cell / seeds + 0.34))))
    grid = canvas.subplots(len(blocks) * len(prompts), wide, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for number, block in enumerate(blocks):
        for row, prompt in enumerate(prompts):
            for column, (title, samples) in enumerate(block):
                axes = grid[number * len(prompts) + row, column]
                strip = [np.asarray(picture.resize((128, 128))) for picture in cut[id(samples)][prompt][:seeds]]
                axes.imshow(np.concatenate(strip, axis=1), extent=(0, seeds, 0, 1), interpolation="none")
                mean = np.mean(samples.brightness(prompt))
                axes.text(seeds, -0.03, f"{mean:.2f}", ha="right", va="top", size=8, color="#555555")
                if column == 0:
                    axes.text(0, 1.03, prompt_label(prompt, 80), ha="left", va="bottom", size=8)
                if row == 0:
                    axes.set_title(title, size=8.5, weight="bold", pad=16)
    canvas.subplots_adjust(
        left=0.005, right=0.995, top=1 - 0.6 / canvas.get_figheight(), bottom=0.02, wspace=0.03, hspace=0.12
    )
    return canvas
