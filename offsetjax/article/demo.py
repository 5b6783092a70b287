"""The article's experiment re-enacted: a grey model, fine-tuned with and without offset noise, and one black picture.

Everything is an ordinary run of the product: `data build`, `train` with `configs/article/fine_tune.py`, `sample` and
`report`. Source: N. Guttenberg, "Diffusion with Offset Noise", CrossLabs, 2023.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from etils import epath

from offsetjax.article.pictures import BLACK_PROMPT, write_black_picture, write_fine_tuning_folder
from offsetjax.config import load_config
from offsetjax.data.build import build
from offsetjax.errors import UserError
from offsetjax.report import report
from offsetjax.sampling.sample import sample_workdir
from offsetjax.train import train
from offsetjax.training.instruments import compilation_cache
from offsetjax.training.metrics import format_duration

_log = logging.getLogger("offsetjax")
_CONFIG = Path(__file__).parents[2] / "configs" / "article" / "fine_tune.py"


@dataclass(frozen=True)
class Arm:
    """One fine-tuning: its name, its data set and what it changes in the config."""

    name: str
    data: str
    steps: int
    overrides: tuple[tuple[str, str], ...]


_BLACK = (("sample.prompts", repr((BLACK_PROMPT,))), ("sample.every_steps", "5"))
ARMS = (
    Arm("plain", "forty", 350, (("noise.offset_strength", "0.0"),)),
    Arm("offset", "forty", 350, (("noise.offset_strength", "0.1"),)),
    Arm("black_plain", "black", 40, (("noise.offset_strength", "0.0"), *_BLACK)),
    Arm("black_offset", "black", 40, (("noise.offset_strength", "0.1"), *_BLACK)),
)
UNCONDITIONAL_SEEDS = range(16)


def demo(out: epath.Path) -> None:
    """Runs every arm in `out` (resuming what is there) and writes `out/report.html`.

    Raises:
        UserError: the configs are not there, as in an installation without a clone.
    """
    if not _CONFIG.exists():
        raise UserError(f"demo: {_CONFIG} is missing; run it from a clone of the project")
    _make_data(out)
    total, done, began = sum(arm.steps for arm in ARMS), 0, time.monotonic()
    with compilation_cache(out):  # the arms share most of what they compile
        for number, arm in enumerate(ARMS, 1):
            _log.info("demo: %d of %d, %s", number, len(ARMS), arm.name)
            overrides = [("data.path", str(out / "data" / arm.data)), ("train.steps", str(arm.steps)), *arm.overrides]
            train(load_config(str(_CONFIG), overrides), out / arm.name)
            done += arm.steps
            left = format_duration((time.monotonic() - began) * (total / done - 1))
            _log.info("demo: %d%% done, about %s left", 100 * done // total, left)
        for start_noise in ("plain", "matched"):
            _draw_unconditional(out / "offset", start_noise)
    report([str(out / arm.name) for arm in ARMS], str(out / "report.html"))
    _log.info("demo: %s after %s", out / "report.html", format_duration(time.monotonic() - began))


def _make_data(out: epath.Path) -> None:
    pictures = {"forty": lambda folder: write_fine_tuning_folder(folder, seed=1), "black": write_black_picture}
    for name, write in pictures.items():
        folder, data = out / "pictures" / name, out / "data" / name
        if not data.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write(str(folder))
            build(str(folder), str(data))


def _draw_unconditional(workdir: epath.Path, start_noise: str) -> None:
    name = f"unconditional_{start_noise}"
    if not (workdir / "samples" / f"{name}.json").exists():
        sample_workdir(workdir, workdir / "samples", [""], UNCONDITIONAL_SEEDS, name=name, start_noise=start_noise)
