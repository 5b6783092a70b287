"""The study of noise in small: every kind of noise from scratch, three seeds each, compared by the brightness it draws.

    .venv/bin/python launch/noise_study.py --out=runs/noise [--jobs=2] [--seeds=3]

makes the pictures, trains `configs/noise/study.py` for each arm and seed (finished runs are kept), draws from each, and
writes `study.json`, `study.md` and `study.png` into the folder. One to one and a half hours on two CPU cores.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from offsetjax.article.pictures import PROMPTS, write_fine_tuning_folder
from offsetjax.data.brightness import compare, data_brightness
from offsetjax.data.build import build
from offsetjax.data.source import open_source
from offsetjax.report.figures import colour, prompt_label, style

CONFIG = Path(__file__).parents[1] / "configs" / "noise" / "study.py"

# What each training changes in the config.
TRAININGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "offset": {"noise.offset_strength": 0.1},
    "pyramid": {"noise.kind": "pyramid", "noise.pyramid_discount": 0.8, "noise.pyramid_levels": 6},
    "adjusted": {"noise.kind": "adjusted", "noise.offset_strength": 0.1},
    "zero terminal SNR": {"schedule.zero_terminal_snr": True},
}
# An arm: which training, and how it is sampled.
ARMS: dict[str, tuple[str, str]] = {
    "plain": ("plain", "plain"),
    "offset, plain start": ("offset", "plain"),
    "offset, matched": ("offset", "matched"),
    "pyramid, matched": ("pyramid", "matched"),
    "adjusted, matched": ("adjusted", "matched"),
    "zero terminal SNR": ("zero terminal SNR", "matched"),
}
UNCONDITIONAL_SEEDS, PROMPT_SEEDS = 48, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2, help="trainings at the same time; one core each")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    out: Path = options.out
    if not (out / "data").exists():
        write_fine_tuning_folder(str(out / "pictures"), seed=2, count_per_prompt=512)
        build(str(out / "pictures"), str(out / "data"))
    runs = [(name, seed) for seed in range(options.seeds) for name in TRAININGS]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda run: run_one(out, *run), runs))
    study = collect(out, range(options.seeds))
    (out / "study.json").write_text(json.dumps(study, indent=1) + "\n")
    (out / "study.md").write_text(table(study))
    figure(study).savefig(out / "study.png")
    print(table(study))


def run_one(out: Path, name: str, seed: int) -> None:
    """Trains one run and draws from it, each in a process of its own; what is finished is left alone."""
    workdir = out / f"{name} {seed}"
    changes = {**TRAININGS[name], "seed": seed, "data.path": str(out / "data")}
    overrides = [f"--config.{path}={value}" for path, value in changes.items()]
    offsetjax("train", f"--config={CONFIG}", f"--workdir={workdir}", *overrides, log=workdir.with_suffix(".log"))
    for arm_name, start in ARMS.values():
        for prompts, count in (((), UNCONDITIONAL_SEEDS), (PROMPTS, PROMPT_SEEDS)):
            folder = drawn(out, name, seed, start, bool(prompts))
            if arm_name != name or (folder / "samples.json").exists():
                continue
            wanted = [f"--prompt={prompt}" for prompt in prompts or ("",)] + [f"--seed={i}" for i in range(count)]
            arguments = [f"--workdir={workdir}", f"--start_noise={start}", f"--out={folder}", *wanted]
            offsetjax("sample", *arguments, log=workdir.with_suffix(".log"))


def drawn(out: Path, name: str, seed: int, start: str, has_prompts: bool) -> Path:
    """Where the pictures of a run are."""
    return out / "drawn" / f"{name} {seed} {start} {'prompts' if has_prompts else 'unconditional'}"


def offsetjax(*arguments: str, log: Path) -> None:
    """Runs the command on one core, with its output in a file."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "OMP_NUM_THREADS": "1"}
    with log.open("a") as file:
        command = [sys.executable, "-m", "offsetjax", *arguments]
        subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=True)


def collect(out: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """The figures of every arm: of each seed and their means."""
    data = data_brightness(open_source(out / "data"), 128)
    arms = {}
    for arm, (name, start) in ARMS.items():
        each = []
        for seed in seeds:
            records = read_records(drawn(out, name, seed, start, False))
            prompts = read_records(drawn(out, name, seed, start, True))
            lines = (out / f"{name} {seed}" / "metrics.jsonl").read_text().splitlines()
            metrics = [json.loads(line) for line in lines]
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
        arms[arm] = each
    return {"data": {"pictures": len(data), **compare(data, data)}, "arms": arms}


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The record of each picture in a folder."""
    return json.loads((folder / "samples.json").read_text())["records"]


def table(study: dict[str, Any]) -> str:
    """Markdown: means over the seeds, ± half the range between them."""

    def over_seeds(values: list[float], digits: int = 2) -> str:
        return f"{np.mean(values):.{digits}f} ± {np.ptp(values) / 2:.{digits}f}"

    lines = [
        "| from scratch | spread of brightness | W1 | near black, white | square / alley / slope / logo | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for arm, each in study["arms"].items():
        prompts = " / ".join(f"{np.mean([run['prompts'][prompt] for run in each]):.2f}" for prompt in PROMPTS)
        ends = ", ".join(f"{np.mean([run[key] for run in each]):.2f}" for key in ("near_black", "near_white"))
        spread, distance = (over_seeds([run[key] for run in each]) for key in ("std", "wasserstein"))
        minutes = np.mean([run["train_minutes"] for run in each])
        lines.append(f"| {arm} | {spread} | {distance} | {ends} | {prompts} | {minutes:.1f} |")
    data = study["data"]
    lines.append(f"| the data | {data['std']:.2f} | 0 | {data['near_black']:.2f}, {data['near_white']:.2f} | | |")
    return "\n".join(lines) + "\n"


@style
def figure(study: dict[str, Any]) -> Figure:
    """A row an arm: the spread without a prompt, the distance to the data's brightness, the mean of each prompt."""
    arms = study["arms"]
    canvas = Figure(figsize=(10, 0.42 * len(arms) + 1.4), layout="constrained")
    panels = canvas.subplots(1, 3, sharey=True)
    for row, each in enumerate(arms.values()):
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
    panels[0].set_yticks(range(len(arms)), list(arms))
    panels[0].set(ylim=(len(arms) - 0.4, -1.1), title="Spread of brightness, no prompt", xlabel="standard deviation")
    panels[1].set(title="Distance to the data's brightness", xlabel="W1, no prompt")
    panels[2].set(title="Mean brightness of each prompt", xlabel="0 black, 1 white", xlim=(0, 1))
    for axes in panels:
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="#EEEEEE", zorder=-1)
    canvas.legend(*panels[2].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return canvas


if __name__ == "__main__":
    main()
