"""Two processes begin a run together, train it and resume it, whichever of them comes first."""

import json
import pathlib
import queue
import time

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from offsetjax.parallel import processes
from offsetjax.train import train
from tests import tiny
from tests.processes import call, call_together


def train_late(config: ConfigDict, workdir: pathlib.Path, delay_seconds: float) -> None:
    """A training that one process comes to when the other could have written all that a run begins with."""
    jax.devices()  # for which processes wait for each other
    time.sleep(delay_seconds)
    train(config, workdir)


def losses(workdir: pathlib.Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert len({line["step"] for line in lines}) == len(lines)
    return {line["step"]: line["loss"] for line in lines}


def told_late(tells: bool) -> str:
    """What is told when the wait for it has timed out before, in real life after a day."""
    processes._DAY_MS = 100
    told: queue.Queue[str] = queue.Queue()
    processes.subscribe("news", told.put)
    time.sleep(1)
    if tells:
        processes.broadcast("news", "SIGTERM")
    return told.get(timeout=60)


def _differing(value: str) -> list[int]:
    return processes.differing(value)


def test_the_processes_whose_value_differs_are_named() -> None:
    assert call_together([(_differing, value) for value in ("a", "b", "a")], num_devices=1) == [[1]] * 3


def test_a_process_that_has_waited_for_days_still_hears_the_others() -> None:
    assert call_together([(told_late, True), (told_late, False)], num_devices=1) == ["SIGTERM", "SIGTERM"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_begin_and_resume_what_one_trains_alone(tmp_path: pathlib.Path) -> None:
    data = tiny.build_data(tmp_path)
    first = tiny.tiny_config(data, train__steps=3, mesh__data=2, mesh__fsdp=2, optimizer__decay="constant")
    then = first.copy_and_resolve_references()
    then.train.steps = 4
    call_together([(train_late, first, tmp_path / "run", delay) for delay in (0, 5)], num_devices=2)
    assert list(losses(tmp_path / "run")) == [1, 2, 3]
    call_together([(train_late, then, tmp_path / "run", delay) for delay in (2, 0)], num_devices=2)
    call(train, then, tmp_path / "alone", num_devices=4)
    together, alone = losses(tmp_path / "run"), losses(tmp_path / "alone")
    assert list(together) == list(alone) == [1, 2, 3, 4]
    np.testing.assert_allclose(list(together.values()), list(alone.values()), rtol=1e-5)
