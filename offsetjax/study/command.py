"""`offsetjax study`: every kind of noise from scratch, three seeds each, compared by the brightness that it draws.

Makes the pictures, trains `configs/noise/study.py` for each kind of noise and seed (finished runs are kept), draws from
each, and writes `study.json`, `study.md` and `study.png` into the folder, and `kinds.png`, which needs no training. One
to one and a half hours on two CPU cores.
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from offsetjax import log
from offsetjax.article.pictures import PROMPTS, write_fine_tuning_folder
from offsetjax.data.build import build
from offsetjax.errors import UserError
from offsetjax.files import write_whole
from offsetjax.plots import png
from offsetjax.study import kinds, results
from offsetjax.study.variants import TRAININGS, VARIANTS, drawn

_log = logging.getLogger("offsetjax")
_CONFIG = Path(__file__).parents[2] / "configs" / "noise" / "study.py"
UNCONDITIONAL_SEEDS, PROMPT_SEEDS = 48, 8


def study(out: str, jobs: int = 2, seeds: int = 3) -> None:
    """Runs the study in a local folder, resuming what is there.

    Args:
        out: the folder.
        jobs: trainings at the same time, one core each.
        seeds: of each training.

    Raises:
        UserError: a number out of range, an installation without the configs, or a training that failed.
    """
    if min(jobs, seeds) < 1:
        raise UserError("study: --jobs and --seeds must be at least 1")
    if not _CONFIG.exists():
        raise UserError(f"study: {_CONFIG} is missing; run it from a clone of the project")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "kinds.png", png(kinds.figure()))
    if not (folder / "data").exists():
        write_fine_tuning_folder(str(folder / "pictures"), seed=2, count_per_prompt=512)
        build(str(folder / "pictures"), str(folder / "data"))
    runs = [(name, seed) for seed in range(seeds) for name in TRAININGS]
    _run_all(folder, runs, jobs)
    found = results.collect(folder, range(seeds))
    write_whole(folder / "study.json", json.dumps(found, indent=1) + "\n")
    write_whole(folder / "study.md", results.table(found))
    write_whole(folder / "study.png", png(results.figure(found)))
    log.show(results.table(found))


def _run_all(out: Path, runs: Sequence[tuple[str, int]], jobs: int) -> None:
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for number, (name, seed) in enumerate(pool.map(lambda run: _run(out, *run), runs), 1):
                _log.info("study: %d of %d, %s, seed %d", number, len(runs), name, seed)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # no more are begun
            raise


def _run(out: Path, name: str, seed: int) -> tuple[str, int]:
    """Trains one run and draws from it, each in a process of its own; what is finished is left alone."""
    workdir = out / f"{name} {seed}"
    output = out / f"{name} {seed}.log"
    changes = {**TRAININGS[name], "seed": seed, "data.path": str(out / "data")}
    overrides = [f"--config.{path}={value}" for path, value in changes.items()]
    _offsetjax("train", f"--config={_CONFIG}", f"--workdir={workdir}", *overrides, output=output)
    for training, start in VARIANTS.values():
        for prompts, count in (((), UNCONDITIONAL_SEEDS), (PROMPTS, PROMPT_SEEDS)):
            folder = drawn(out, name, seed, start, bool(prompts))
            if training != name or (folder / "samples.json").exists():
                continue
            wanted = [f"--prompt={prompt}" for prompt in prompts or ("",)] + [f"--seed={i}" for i in range(count)]
            arguments = [f"--workdir={workdir}", f"--start_noise={start}", f"--out={folder}", *wanted]
            _offsetjax("sample", *arguments, output=output)
    return name, seed


def _offsetjax(*arguments: str, output: Path) -> None:
    """Runs the command on one core, with its output in a file."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "OMP_NUM_THREADS": "1"}
    command: Sequence[str] = [sys.executable, "-m", "offsetjax", *arguments]
    with output.open("a") as file:
        status = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if status == 2:
        raise UserError(f"study: offsetjax {arguments[0]} refused its settings; {output} says why")
    if status:
        raise subprocess.CalledProcessError(status, command)
