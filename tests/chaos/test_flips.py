"""Bits that flip in the files of a work directory: reported by whoever reads the file again, or without any effect."""

import random
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from offsetjax.config import to_json
from offsetjax.errors import UserError
from offsetjax.models.family import family_of
from offsetjax.models.frozen import frozen_tensors, read_tokenizers
from offsetjax.models.pipeline import build
from offsetjax.models.trained import read_config
from offsetjax.report.read import _read_samples, read_picture
from offsetjax.storage import arrays as step_arrays
from offsetjax.storage import checkpoint, digests, record
from offsetjax.training.goodput import read_goodput
from offsetjax.training.jsonl import read_log
from tests import tiny

# Read by people and by other programs, and by nothing of ours: nothing that we do can be another for them.
NOT_READ = ("starts.jsonl", "events.out.tfevents", "lock")


def _step(workdir: Path, step: int) -> Any:
    """All arrays of a step, each compared with its checksum, and the data position."""
    with checkpoint.open_checkpoints(workdir) as manager:
        arrays = step_arrays._Arrays(manager, checkpoint.existing_step(manager, step))
        found = {name: arrays.read(name.split("/")) for name in arrays.checksums}
        return found | {"data position": checkpoint.read_data(manager, step)}


def _frozen(workdir: Path) -> Any:
    folder = workdir / "frozen"
    digests.check(folder)
    config = read_config(workdir)
    pipeline = build(config, read_tokenizers(folder, family_of(config.model)))
    return {
        part: {name: tensor() for name, tensor in frozen_tensors(folder, part, pipeline.parts[part]).items()}
        for part in pipeline.frozen
    } | {file.name: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.suffix != ".safetensors"}


def _metrics(workdir: Path) -> Any:
    log = read_log(workdir)
    if log.unreadable or log.torn:
        raise UserError("lines are set aside")
    return [(line.step, line.values) for line in log.lines]


def _samples(workdir: Path) -> Any:
    files = sorted((workdir / "samples").glob("*.json"))
    return [(_read_samples(file), np.asarray(read_picture(file.with_suffix(".png")))) for file in files]


def _saved(workdir: Path) -> int:
    step = record.newest_saved(workdir)
    if not step:
        raise UserError("a warning says so, and then it is not known")
    return step


def _goodput(workdir: Path) -> dict[str, float]:
    seconds = read_goodput(workdir)
    if not seconds:
        raise UserError("a warning says so, and then it is not known")
    return seconds


# How what lies where is read again.
READERS: dict[str, Callable[[Path], Any]] = {
    "frozen": _frozen,
    "config.json": lambda workdir: to_json(read_config(workdir)),
    "metrics.jsonl": _metrics,
    "samples": _samples,
    "saved.json": _saved,
    "goodput.json": _goodput,
    **{f"checkpoints/{step}": partial(_step, step=step) for step in (2, 4, 6)},
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training, to be damaged; without what was compiled, which is flipped apart."""
    copy = tmp_path_factory.mktemp("flips") / "run"
    shutil.copytree(tiny.trained_workdir(tmp_path_factory.getbasetemp()), copy)
    return copy


def _files(workdir: Path) -> list[Path]:
    return sorted(file for file in workdir.rglob("*") if file.is_file() and file.stat().st_size)


def _same(one: Any, other: Any) -> bool:
    leaves, others = jax.tree.leaves(one), jax.tree.leaves(other)
    return len(leaves) == len(others) and all(np.array_equal(a, b) for a, b in zip(leaves, others, strict=True))


def _flip(workdir: Path, count: int, seed: int) -> Counter[str]:
    """What became of each flip, by the part of the work directory: all files alike, whatever their size."""
    rng, found = random.Random(seed), Counter[str]()
    good = {name: read(workdir) for name, read in READERS.items()}
    files = _files(workdir)
    for _ in range(count):
        file = rng.choice(files)
        name = "/".join(file.relative_to(workdir).parts[: 2 if "checkpoints" in file.parts else 1])
        data = file.read_bytes()
        bit = rng.randrange(8 * len(data))
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        if name.startswith(NOT_READ):
            found["not read again"] += 1
            continue
        file.write_bytes(flipped)
        try:
            outcome = "harmless" if _same(READERS[name](workdir), good[name]) else "silent"
        except UserError as error:
            outcome = "reported" if "\n" not in str(error) else "reported in several lines"
        finally:
            file.write_bytes(data)
        found[outcome] += 1
        if outcome == "silent":
            found[f"silent: {file.relative_to(workdir)}, bit {bit}"] += 1
    return found


def test_no_flipped_bit_is_silent(workdir: Path) -> None:
    found = _flip(workdir, 30, seed=1)
    assert found["reported"] > 5 and not found["silent"] and not found["reported in several lines"], found


@pytest.mark.chaos
@pytest.mark.timeout(7200)
def test_no_flipped_bit_of_300_is_silent(workdir: Path) -> None:
    found = _flip(workdir, 300, seed=0)
    print(f"\n300 flips over {len(_files(workdir))} files: {dict(found)}")
    assert not found["silent"] and not found["reported in several lines"], found
