"""The real trainer in several processes: what they draw and save together, how they stop, and how they resume."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.launch.pod import (
    SAVED_EVERY,
    STEPS,
    Moment,
    Pod,
    assert_kills_lose_nothing,
    assert_same,
    committed,
    last_step,
    pod_of,
    resumed_at,
    saving,
    steps_of,
    watched,
)


@pytest.fixture(scope="module")
def pod(tmp_path_factory: pytest.TempPathFactory) -> Pod:
    return pod_of(tmp_path_factory)


def test_watches_and_saves_of_several_processes(pod: Pod) -> None:
    straight = pod.straight()
    assert sorted(steps_of(straight)) == list(range(1, STEPS + 1))
    assert committed(straight) == list(range(SAVED_EVERY, STEPS + 1, SAVED_EVERY))
    assert [line["step"] for line in watched(straight)] == [0, 8, 16]
    assert all(line["validation_plain"] > 0 for line in watched(straight))
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "loss" in line)
    assert last["slowest_process"] in (0, 1)
    assert last["own_seconds_most"] >= last["own_seconds_median"] >= 0
    assert last["data_wait_seconds_most"] >= last["data_wait_seconds"]


@pytest.mark.slow
def test_pictures_of_several_processes_are_those_of_one(pod: Pod, tmp_path: Path) -> None:
    options = ("--config.train.steps=1", "--config.sample.every_steps=1", "--config.probe.every_steps=1")
    for count in (1, 2):
        with pod.train(tmp_path / str(count), count, *options) as processes:
            assert processes.wait(600) == [0] * count, processes.text()
    for kind in ("step", "probe"):
        one, two = (Image.open(tmp_path / str(count) / "samples" / f"{kind}_0.png") for count in (1, 2))
        assert np.abs(np.asarray(one, np.float32) - np.asarray(two, np.float32)).max() <= 1
    one, two = (watched(tmp_path / str(count)) for count in (1, 2))
    assert [sorted(line) for line in one] == [sorted(line) for line in two]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_signal_and_a_kill_in_a_save_lose_nothing_that_is_saved(count: int, pod: Pod, tmp_path: Path) -> None:
    """SIGTERM to one process ends all after one step, which is saved; SIGKILL of the last in a later save
    ends the others too; and the training still ends as one that nobody touched."""
    workdir = tmp_path / "run"
    with pod.train(workdir, count) as processes:
        processes.wait_for(lambda: last_step(processes) >= 3)
        processes.send(signal.SIGTERM, count - 1)
        assert processes.wait(60) == [143] * count, processes.text()
        (step,) = {re.search(r"SIGTERM after step (\d+);", processes.output(index))[1] for index in range(count)}  # type: ignore[index]
    assert committed(workdir) == sorted({*range(SAVED_EVERY, int(step), SAVED_EVERY), int(step)})
    assert len(steps_of(workdir)) == int(step) < STEPS
    # Of as many processes: sums over other devices' parts differ in the last bits.
    assert_kills_lose_nothing([Moment(count - 1, saving(3 * SAVED_EVERY))], pod, workdir, count=count, saved=int(step))


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_second_signal_ends_a_compilation_at_once(count: int, pod: Pod, tmp_path: Path) -> None:
    with pod.train(tmp_path / "run", count, JAX_COMPILATION_CACHE_DIR="") as processes:
        processes.wait_for(lambda: "noise:" in processes.output(0))
        processes.send(signal.SIGTERM, 0)
        processes.wait_for(lambda: "a second one ends it at once" in processes.output(0))
        time.sleep(1.5)
        assert [process.poll() for process in processes.processes] == [None] * count, processes.text()
        processes.send(signal.SIGTERM, 0)
        assert processes.wait(10) == [143] * count, processes.text()
        assert "ended at once, nothing more is saved" in processes.output(0)
    assert committed(tmp_path / "run") == []


# The second process's data blocks: a disk, or a bucket, that does not answer any more.
BLOCKED = """
import itertools, os, sys, threading
import tests.launch.pod_main
from offsetjax.data import stream

decode, pictures = stream.decode, itertools.count()

def blocking(data):
    if os.environ["JAX_PROCESS_ID"] == "1" and next(pictures) >= 40:
        threading.Event().wait()
    return decode(data)

stream.decode = blocking
from offsetjax.cli import main
sys.exit(main())
"""


@pytest.mark.slow
def test_blocked_data_ends_all_with_the_stack_of_every_thread_and_the_run_goes_on(pod: Pod, tmp_path: Path) -> None:
    workdir, straight = tmp_path / "run", pod.straight()
    with pod.train(workdir, 2, "--config.train.stall_seconds=60", program=("-c", BLOCKED)) as processes:
        assert processes.wait(300) == [75, 75], processes.text()
        told = processes.output(0) + processes.output(1)
        assert "error: stalled: no progress for 60 s (train.stall_seconds)" in told, told
        for index in range(2):
            assert 'train.py", line' in processes.output(index)  # where the loop waits
            assert processes.output(index).count("(most recent call first)") > 3
        assert "in blocking" in processes.output(1)
    saved = committed(workdir)  # none where the data, which are read ahead, stopped before the first save
    with pod.train(workdir) as processes:
        assert processes.wait(600) == [0, 0], processes.text()
        assert not saved or resumed_at(processes) == saved[-1]
    assert_same(workdir, straight)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("devices", "back"),
    [(2, False), pytest.param(2, True, marks=pytest.mark.slow), pytest.param(4, True, marks=pytest.mark.slow)],
)
def test_a_checkpoint_goes_from_two_processes_to_one_and_back(
    devices: int, back: bool, pod: Pod, tmp_path: Path
) -> None:
    workdir, straight = tmp_path / "run", pod.straight(2, devices)
    shutil.copytree(straight, workdir)
    for step in (STEPS, STEPS - SAVED_EVERY):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    ways = ((1, STEPS - SAVED_EVERY), (2, STEPS))[: 1 + back]
    for count, steps in ways:
        with pod.train(workdir, count, f"--config.train.steps={steps}", devices=devices) as processes:
            assert processes.wait(600) == [0] * count, processes.text()
            assert resumed_at(processes) == steps - SAVED_EVERY
    expected, found = steps_of(straight), steps_of(workdir)
    for step in range(STEPS - 2 * SAVED_EVERY + 1, ways[-1][1] + 1):
        # The sums of the first step have another order, and so the weights from then on other last bits.
        tolerance = 1e-6 if step == STEPS - 2 * SAVED_EVERY + 1 else 1e-3
        assert float.fromhex(found[step][0]) == pytest.approx(float.fromhex(expected[step][0]), rel=tolerance), step
