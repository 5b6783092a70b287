"""What a study has found: the figures of each variant, a table of them and a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from offsetjax.article.pictures import PROMPTS
from offsetjax.data.brightness import compare, data_brightness
from offsetjax.data.source import open_source
from offsetjax.json_text import parse_object
from offsetjax.plots import colour, prompt_label, style
from offsetjax.study.variants import VARIANTS, drawn


def collect(out: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """The figures of every variant: of each seed and their means."""
    data = data_brightness(open_source(out / "data"), 128)
    variants: dict[str, Any] = {}
    for variant, (name, start) in VARIANTS.items():
        each: list[dict[str, Any]] = []
        for seed in seeds:
            records = read_records(drawn(out, name, seed, start, False))
            prompts = read_records(drawn(out, name, seed, start, True))
            lines = (out / f"{name} {seed}" / "metrics.jsonl").read_text().splitlines()
            metrics = [parse_object(line, takes_nan=True) for line in lines]
            # A validation has a line of its own, before that of its step.
            validations = [line["validation_plain"] for line in metrics if "validation_plain" in line]
            each.append(
                {
                    "seed": seed,
                    **compare([record["brightness"] for record in records], data),
                    "prompts": {
                        prompt: float(np.mean([r["brightness"] for r in prompts if r["prompt"] == prompt]))
                        for prompt in PROMPTS
                    },
                    "validation_plain": validations[-1],
                    "train_minutes": metrics[-1]["time_seconds"] / 60,
                }
            )
        variants[variant] = each
    return {"data": {"pictures": len(data), **compare(data.tolist(), data)}, "variants": variants}


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The record of each picture in a folder."""
    return parse_object((folder / "samples.json").read_bytes())["records"]


def table(study: dict[str, Any]) -> str:
    """Markdown: means over the seeds, ± half the range between them."""

    def over_seeds(values: list[float], digits: int = 2) -> str:
        return f"{np.mean(values):.{digits}f} ± {np.ptp(values) / 2:.{digits}f}"

    lines = [
        "| from scratch | spread of brightness | W1 | near black, white | square / alley / slope / logo | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for variant, each in study["variants"].items():
        prompts = " / ".join(f"{np.mean([run['prompts'][prompt] for run in each]):.2f}" for prompt in PROMPTS)
        ends = ", ".join(f"{np.mean([run[key] for run in each]):.2f}" for key in ("near_black", "near_white"))
        spread, distance = (over_seeds([run[key] for run in each]) for key in ("std", "wasserstein"))
        minutes = np.mean([run["train_minutes"] for run in each])
        lines.append(f"| {variant} | {spread} | {distance} | {ends} | {prompts} | {minutes:.1f} |")
    data = study["data"]
    lines.append(f"| the data | {data['std']:.2f} | 0 | {data['near_black']:.2f}, {data['near_white']:.2f} | | |")
    return "\n".join(lines) + "\n"


@style
def figure(study: dict[str, Any]) -> Figure:
    """A row a variant: the spread without a prompt, the distance to the data's brightness, the mean of each prompt."""
    variants = study["variants"]
    canvas = Figure(figsize=(10, 0.42 * len(variants) + 1.4), layout="constrained")
    panels = canvas.subplots(1, 3, sharey=True)
    for row, each in enumerate(variants.values()):
        for axes, key in zip(panels, ("std", "wasserstein"), strict=False):
            values = [run[key] for run in each]
            axes.barh(row, np.mean(values), 0.6, color=colour(0), alpha=0.35)
            axes.plot(values, [row] * len(values), "o", ms=4, color=colour(0))
        for index, prompt in enumerate(PROMPTS):
            values = [run["prompts"][prompt] for run in each]
            label = prompt_label(prompt, 40) if row == 0 else None
            panels[2].plot(values, [row] * len(values), "o", ms=5, alpha=0.8, color=colour(index), label=label)
    panels[0].axvline(study["data"]["std"], color="#555555", lw=1, ls="--")
    panels[0].text(study["data"]["std"], -0.75, "the data ", ha="right", color="#555555")
    panels[0].set_yticks(range(len(variants)), list(variants))
    panels[0].set(
        ylim=(len(variants) - 0.4, -1.1), title="Spread of brightness, no prompt", xlabel="standard deviation"
    )
    panels[1].set(title="Distance to the data's brightness", xlabel="W1, no prompt")
    panels[2].set(title="Mean brightness of each prompt", xlabel="0 black, 1 white", xlim=(0, 1))
    for axes in panels:
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="#EEEEEE", zorder=-1)
    canvas.legend(*panels[2].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return canvas
