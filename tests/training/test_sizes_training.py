"""Trainings of pictures of several sizes: alike on any number of processes and devices, and from the cache."""

import json
import pathlib
import re
from typing import Any

import numpy as np
import pytest

from offsetjax.data.source import open_source
from offsetjax.prepare.latents import encode_data
from offsetjax.train import train
from tests.data.shapes import pictures_of_shapes
from tests.processes import call_together
from tests.tiny import tiny_config

STEPS = 6
SEVERAL: dict[str, Any] = {
    "data__buckets": ("16x16", "24x16", "8x8"),
    "data__max_aspect": 2.0,
    "data__equal_tokens": 8,
    "data__random_crop": True,
    "train__global_batch_size": 8,
    "checkpoint__every_steps": 1,
    "optimizer__decay": "constant",  # the rate of a step does not depend on how many there will be
}


def _train(data: str, workdir: str, steps: int, changes: dict[str, Any]) -> list[dict[str, float]]:
    train(tiny_config(data, **{**SEVERAL, "train__steps": steps, **changes}), workdir)
    return lines(pathlib.Path(workdir))


def lines(workdir: pathlib.Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(found: list[dict[str, float]]) -> list[float]:
    return [line["loss"] for line in found if "loss" in line]


def run(data: pathlib.Path, workdir: pathlib.Path, steps: int, processes: int, devices: int) -> list[float]:
    found = call_together([(_train, str(data), str(workdir), steps, {})] * processes, devices, seconds=900)
    return losses(found[0])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_losses_are_the_same_on_any_number_of_processes_and_devices_and_resumed_at_any_step(
    tmp_path: pathlib.Path,
) -> None:
    data = pictures_of_shapes(tmp_path)
    whole = run(data, tmp_path / "whole", STEPS, 1, 1)
    assert len(whole) == STEPS and np.isfinite(whole).all()
    for processes, devices in ((1, 8), (2, 2), (4, 1)):
        found = run(data, tmp_path / f"{processes} x {devices}", STEPS, processes, devices)
        np.testing.assert_allclose(found, whole, rtol=2e-5)
    for step, (processes, devices) in enumerate(((1, 1), (2, 1), (1, 4), (4, 1), (1, 2), (1, 1)), start=1):
        found = run(data, tmp_path / "resumed", step, processes, devices)
    np.testing.assert_allclose(found, whole, rtol=2e-5)


MIXED: dict[str, Any] = {"data__mixed_sizes": True, "train__accumulate_steps": 2, "train__global_batch_size": 16}


def _train_mixed(data: str, workdir: str, steps: int) -> list[dict[str, float]]:
    return _train(data, workdir, steps, MIXED)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_steps_of_parts_of_different_sizes_are_the_same_on_any_number_of_processes_and_resumed_at_any_step(
    tmp_path: pathlib.Path,
) -> None:
    data = pictures_of_shapes(tmp_path)

    def run_mixed(workdir: str, steps: int, processes: int, devices: int) -> list[dict[str, float]]:
        calls = [(_train_mixed, str(data), str(tmp_path / workdir), steps)] * processes
        return call_together(calls, devices, seconds=900)[0]

    found = run_mixed("whole", STEPS, 1, 1)
    whole = losses(found)
    assert len(whole) == STEPS and np.isfinite(whole).all()
    sizes = [{name for name in line if re.fullmatch(r"loss_\d+x\d+", name)} for line in found if "loss" in line]
    assert any(len(each) == 2 for each in sizes)  # of one step, whose line it is
    for processes, devices in ((1, 8), (2, 2), (4, 1)):
        np.testing.assert_allclose(losses(run_mixed(f"{processes}", STEPS, processes, devices)), whole, rtol=2e-5)
    for step, (processes, devices) in enumerate(((1, 1), (2, 1), (1, 4), (4, 1), (1, 2), (1, 1)), start=1):
        found = run_mixed("resumed", step, processes, devices)
    np.testing.assert_allclose(losses(found), whole, rtol=2e-5)
    again = run_mixed("again", 3, 1, 1) and run_mixed("again", STEPS, 1, 1)
    assert losses(again) == whole  # bit for bit, on the same devices


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_training_from_latents_of_several_sizes_is_the_one_from_the_pictures(tmp_path: pathlib.Path) -> None:
    data = pictures_of_shapes(tmp_path)
    changes = {**SEVERAL, "data__random_crop": False, "train__steps": STEPS, "data__split": "train[:25]"}
    changes |= {"validation__split": "train[25:]", "validation__every_steps": 3, "validation__timesteps": (500,)}
    train(tiny_config(data, **changes), tmp_path / "pictures")
    encode_data(tiny_config(data, **changes), tmp_path / "cache")
    train(tiny_config(tmp_path / "cache", data__cached_latents=True, **changes), tmp_path / "latents")
    seen, read = lines(tmp_path / "pictures"), lines(tmp_path / "latents")
    assert [line["step"] for line in seen] == [line["step"] for line in read]
    compared = 0
    for one, other in zip(seen, read, strict=True):
        names = [name for name in one if name.startswith(("loss", "validation"))]
        assert names == [name for name in other if name.startswith(("loss", "validation"))]
        np.testing.assert_allclose([one[name] for name in names], [other[name] for name in names], rtol=1e-3)
        compared += len(names)
    assert compared > 3 * STEPS
    sizes = {name.removeprefix("validation_plain_") for line in seen for name in line if name.endswith(("x16", "x8"))}
    assert {"16x16", "24x16"} <= sizes
    assert len(open_source(tmp_path / "cache", cached_latents=True)) == len(open_source(data))
