"""The article's experiment re-enacted: a grey model, fine-tuned with and without offset noise, and one black picture.

Everything is an ordinary run of the product: `data build`, `train` with `configs/article/fine_tune.py`, `sample` and
`report`. Source: N. Guttenberg, "Diffusion with Offset Noise", CrossLabs, 2023.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from etils import epath

from offsetjax.article.pictures import BLACK_PROMPT, write_black_picture, write_fine_tuning_folder
from offsetjax.article.section import article_section
from offsetjax.config import load_config
from offsetjax.data.build import build
from offsetjax.errors import UserError
from offsetjax.report import report
from offsetjax.sampling.sample import sample_workdir
from offsetjax.train import train
from offsetjax.training.instruments import compilation_cache
from offsetjax.training.writers import format_duration

_log = logging.getLogger("offsetjax")
_CONFIG = Path(__file__).parents[2] / "configs" / "article" / "fine_tune.py"


@dataclass(frozen=True)
class FineTuning:
    """One fine-tuning: its name, its data set and what it changes in the config."""

    name: str
    data: str
    steps: int
    overrides: tuple[tuple[str, str], ...]


_BLACK = (("sample.prompts", repr((BLACK_PROMPT,))), ("sample.every_steps", "5"))
FINE_TUNINGS = (
    FineTuning("plain", "forty", 350, (("noise.offset_strength", "0.0"),)),
    FineTuning("offset", "forty", 350, (("noise.offset_strength", "0.1"),)),
    FineTuning("black_plain", "black", 40, (("noise.offset_strength", "0.0"), *_BLACK)),
    FineTuning("black_offset", "black", 40, (("noise.offset_strength", "0.1"), *_BLACK)),
)
START_NOISES = ("plain", "matched")  # of the pictures that "offset" draws for no prompt
UNCONDITIONAL_SEEDS = range(16)


@dataclass(frozen=True)
class Stage:
    """A part of the demonstration; `cost` is its share of the time, in any unit, and `result` a file that it leaves."""

    name: str
    cost: float
    result: epath.Path
    run: Callable[[], object]


def demo(
    out: epath.Path, fine_tunings: Sequence[FineTuning] = FINE_TUNINGS, seeds: Sequence[int] = UNCONDITIONAL_SEEDS
) -> None:
    """Runs every fine-tuning in `out` (resuming what is there) and writes `out/report.html`.

    Args:
        out: a folder.
        fine_tunings: what is trained, one of them called "offset".
        seeds: of the pictures for no prompt.

    Raises:
        UserError: the configs are not there, as in an installation without a clone.
    """
    if not _CONFIG.exists():
        raise UserError(f"demo: {_CONFIG} is missing; run it from a clone of the project")
    began = time.monotonic()
    _make_data(out)
    with compilation_cache(out):  # the fine-tunings share most of what they compile
        run_stages(_stages(out, fine_tunings, seeds))
    _log.info("demo: %s after %s", out / "report.html", format_duration(time.monotonic() - began))


def _stages(out: epath.Path, fine_tunings: Sequence[FineTuning], seeds: Sequence[int]) -> list[Stage]:
    stages = []
    for each in fine_tunings:
        # Costs are seconds on two CPU cores, of which some are for compiling and for the samples.
        last = out / each.name / "samples" / f"step_{each.steps}.json"
        stages.append(Stage(each.name, 15 + each.steps * 0.4, last, partial(_fine_tune, out, each)))
    for start_noise in START_NOISES:
        name = f"unconditional_{start_noise}"
        drawn = out / "offset" / "samples" / f"{name}.json"
        draw = partial(_draw_unconditional, out / "offset", name, start_noise, seeds)
        stages.append(Stage(f"pictures for no prompt, {start_noise} start", 15, drawn, draw))
    workdirs = [str(out / each.name) for each in fine_tunings]
    write = partial(report, workdirs, str(out / "report.html"), [article_section()])
    stages.append(Stage("the report", 5, out / "report.html", write))
    return stages


def run_stages(stages: Sequence[Stage]) -> None:
    """Runs all, and logs before each how much is done and how long the rest may take.

    Stages whose result is there, of a demonstration that was interrupted, are run again and take next to no time: they
    count neither as done nor as left.
    """
    costs = [0.0 if stage.result.exists() else stage.cost for stage in stages]
    total, done, began = sum(costs), 0.0, time.monotonic()
    for number, (stage, cost) in enumerate(zip(stages, costs, strict=True), 1):
        left = ""
        if done:
            seconds = (time.monotonic() - began) * (total / done - 1)
            left = f"; {100 * done / total:.0f}% done, about {format_duration(seconds)} left"
        _log.info("demo: %d of %d, %s%s", number, len(stages), stage.name, left)
        stage.run()
        done += cost


def _make_data(out: epath.Path) -> None:
    pictures = {"forty": lambda folder: write_fine_tuning_folder(folder, seed=1), "black": write_black_picture}
    for name, write in pictures.items():
        folder, data = out / "pictures" / name, out / "data" / name
        if not data.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write(str(folder))
            build(str(folder), str(data))


def _fine_tune(out: epath.Path, each: FineTuning) -> None:
    overrides = [("data.path", str(out / "data" / each.data)), ("train.steps", str(each.steps)), *each.overrides]
    train(load_config(str(_CONFIG), overrides), out / each.name)


def _draw_unconditional(workdir: epath.Path, name: str, start_noise: str, seeds: Sequence[int]) -> None:
    if not (workdir / "samples" / f"{name}.json").exists():
        sample_workdir(workdir, workdir / "samples", [""], seeds, name=name, start_noise=start_noise)
