"""The real trainer in several processes, with real signals: what is saved, what is lost, and how it goes on."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.launch.fake_cloud import Cloud
from tests.several import HEARTBEAT_SECONDS, ROOT, Several, free_port
from tests.tiny import CAPTIONS, build_data, quick_compilation

STEPS, SAVED_EVERY = 16, 4

CONFIG = """
from tests.tiny import tiny_config

def get_config():
    config = tiny_config({data!r}, train__steps={steps}, checkpoint__every_steps={every}, checkpoint__max_to_keep=100)
    config.data.split = "train[:75%]"
    config.optimizer.decay = "constant"  # a cosine would end elsewhere with another train.steps
    config.validation.update(every_steps=8, split="train[75%:]", num_examples=4, timesteps=(500,))
    config.sample.prompts = {prompts!r}
    config.probe.seeds_per_prompt = 2
    return config
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("pod")
    settings = {"data": str(build_data(base)), "steps": STEPS, "every": SAVED_EVERY, "prompts": CAPTIONS[:1]}
    (base / "config.py").write_text(CONFIG.format(**settings))
    return base


@pytest.fixture(scope="module")
def environment(base: Path) -> Iterator[dict[str, str]]:
    with quick_compilation(base) as variables:
        yield variables


Train = Callable[..., Several]


@pytest.fixture(scope="module")
def train(base: Path, environment: dict[str, str]) -> Train:
    """Starts a training; two devices in all, unless it is said."""

    def start(workdir: Path, count: int = 2, *options: str, devices: int = 2) -> Several:
        command = ["-m", "offsetjax", "train", f"--config={base / 'config.py'}", f"--workdir={workdir}", *options]
        return Several(
            count, command, workdir.parent / f"{workdir.name} output", max(1, devices // count), **environment
        )

    return start


@pytest.fixture(scope="module")
def straight(base: Path, train: Train) -> Path:
    """The undisturbed training, of two processes."""
    with train(base / "straight") as processes:
        assert processes.wait(600) == [0, 0], processes.text()
    return base / "straight"


def _steps(workdir: Path) -> dict[int, tuple[str, str]]:
    """The loss and the gradient's norm of each step, in hex."""
    file = workdir / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    assert len({line["step"] for line in lines if "loss" in line}) == sum("loss" in line for line in lines)
    return {line["step"]: (line["loss"].hex(), line["grad_norm"].hex()) for line in lines if "loss" in line}


def _watched(workdir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{**line, "time_seconds": 0} for line in lines if "loss" not in line]


def _committed(workdir: Path) -> list[int]:
    return sorted(int(folder.name) for folder in (workdir / "checkpoints").glob("*") if folder.name.isdecimal())


def _checksums(workdir: Path, step: int) -> dict[str, int]:
    """The checksums of all parameters, moments and averages when they were saved."""
    return json.loads((workdir / "checkpoints" / str(step) / "data" / "metadata").read_text())["checksums"]


def _assert_same(workdir: Path, straight: Path) -> None:
    assert _steps(workdir) == _steps(straight)
    assert _watched(workdir) == _watched(straight)
    assert _checksums(workdir, STEPS) == _checksums(straight, STEPS)


def _resumed_at(processes: Several) -> int:
    found = re.search(r"resuming .* at step (\d+)", processes.output(0))
    return int(found[1]) if found else 0


def test_watches_and_saves_of_several_processes(straight: Path) -> None:
    assert sorted(_steps(straight)) == list(range(1, STEPS + 1))
    assert _committed(straight) == list(range(SAVED_EVERY, STEPS + 1, SAVED_EVERY))
    assert [line["step"] for line in _watched(straight)] == [0, 8, 16]
    assert all(line["validation_plain"] > 0 for line in _watched(straight))


@pytest.mark.slow
def test_pictures_of_several_processes_are_those_of_one(train: Train, tmp_path: Path) -> None:
    options = ("--config.train.steps=1", "--config.sample.every_steps=1", "--config.probe.every_steps=1")
    for count in (1, 2):
        with train(tmp_path / str(count), count, *options) as processes:
            assert processes.wait(600) == [0] * count, processes.text()
    for kind in ("step", "probe"):
        one, two = (Image.open(tmp_path / str(count) / "samples" / f"{kind}_0.png") for count in (1, 2))
        assert np.abs(np.asarray(one, np.float32) - np.asarray(two, np.float32)).max() <= 1
    one, two = (_watched(tmp_path / str(count)) for count in (1, 2))
    assert [sorted(line) for line in one] == [sorted(line) for line in two]


@pytest.mark.parametrize("count", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_sigterm_to_one_saves_a_step_from_which_all_go_on(
    count: int, train: Train, straight: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    with train(workdir, count) as processes:
        processes.wait_for(lambda: len(_steps(workdir)) >= 3)
        processes.send(signal.SIGTERM, count - 1)
        assert processes.wait(30) == [143] * count, processes.text()
        (step,) = {re.search(r"SIGTERM after step (\d+);", processes.output(index))[1] for index in range(count)}  # type: ignore[index]
    assert _committed(workdir)[-1] == int(step) < STEPS
    assert len(_steps(workdir)) == int(step)
    if count != 2:  # sums over other devices' parts differ in the last bits: the same number runs undisturbed
        straight = tmp_path / "straight"
        with train(straight, count) as processes:
            assert processes.wait(600) == [0] * count, processes.text()
    with train(workdir, count) as processes:
        assert processes.wait(600) == [0] * count, processes.text()
        assert _resumed_at(processes) == int(step)
    _assert_same(workdir, straight)


def _kill(processes: Several, workdir: Path, who: int, moment: int | None) -> int:
    """Kills one process at a step, or for None during a save; returns the last step that was committed then."""
    saving = lambda: list((workdir / "checkpoints").glob("*orbax-checkpoint-tmp*"))  # noqa: E731
    processes.wait_for(saving if moment is None else lambda: max(_steps(workdir), default=0) >= moment)
    processes.send(signal.SIGKILL, who)
    committed = max(_committed(workdir), default=0)
    statuses = processes.wait(HEARTBEAT_SECONDS + 10)
    assert statuses.pop(who) == 137
    assert set(statuses) <= {1, 75, 134}, processes.text()
    return committed


def _assert_kills_lose_nothing(
    moments: list[tuple[int, int | None]], train: Train, straight: Path, workdir: Path
) -> None:
    committed = 0
    for who, moment in moments:
        with train(workdir) as processes:
            before, committed = committed, _kill(processes, workdir, who, moment)
            assert _resumed_at(processes) >= before
    with train(workdir) as processes:
        assert processes.wait(600) == [0, 0], processes.text()
        assert _resumed_at(processes) >= committed
    _assert_same(workdir, straight)


def test_a_killed_process_ends_the_other_and_nothing_saved_is_lost(
    train: Train, straight: Path, tmp_path: Path
) -> None:
    _assert_kills_lose_nothing([(1, None), (0, 11)], train, straight, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kills_at_ten_moments(train: Train, straight: Path, tmp_path: Path) -> None:
    random.seed(0)
    moments = [
        (random.randrange(2), None if index % 3 == 0 else random.randrange(index, index + 5)) for index in range(10)
    ]
    _assert_kills_lose_nothing(moments, train, straight, tmp_path / "run")


@pytest.mark.parametrize("devices", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_checkpoint_goes_from_two_processes_to_one_and_back(
    devices: int, train: Train, straight: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    if devices != 2:
        straight = tmp_path / "straight"
        with train(straight, 2, devices=devices) as processes:
            assert processes.wait(600) == [0, 0], processes.text()
    shutil.copytree(straight, workdir)
    for step in (STEPS, STEPS - SAVED_EVERY):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    for count, steps in ((1, STEPS - SAVED_EVERY), (2, STEPS)):
        with train(workdir, count, f"--config.train.steps={steps}", devices=devices) as processes:
            assert processes.wait(600) == [0] * count, processes.text()
            assert _resumed_at(processes) == steps - SAVED_EVERY
    expected, found = _steps(straight), _steps(workdir)
    for step in range(STEPS - 2 * SAVED_EVERY + 1, STEPS + 1):
        # The sums of the first step have another order, and so the weights from then on other last bits.
        tolerance = 1e-6 if step == STEPS - 2 * SAVED_EVERY + 1 else 1e-3
        assert float.fromhex(found[step][0]) == pytest.approx(float.fromhex(expected[step][0]), rel=tolerance), step


# What a machine of the fake cloud runs in the place of launch/local.sh: the real trainer, one process of four.
WORKER = """
  export JAX_PROCESS_ID=${{MACHINE##*/}} JAX_NUM_PROCESSES=4 JAX_COORDINATOR_ADDRESS=localhost:{port} {variables}
  exec {python} -m offsetjax "${{@/#--workdir=gs:\\/\\//--workdir=$FAKE_CLOUD/gs/}}"
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_supervised_run_of_four_workers_survives_the_loss_of_one(
    base: Path, train: Train, environment: dict[str, str], tmp_path: Path
) -> None:
    with train(tmp_path / "straight", 4) as processes:
        assert processes.wait(600) == [0] * 4, processes.text()
    cloud, workdir = Cloud(tmp_path / "cloud"), tmp_path / "cloud" / "gs" / "bucket" / "run"
    cloud.plan["workers"] = 4
    variables = {**environment, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    variables["OFFSETJAX_HEARTBEAT_SECONDS"] = str(HEARTBEAT_SECONDS)
    words = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    worker = WORKER.format(port=free_port(), variables=words, python=sys.executable)
    local_sh = cloud.checkout / "launch" / "local.sh"
    local_sh.write_text(local_sh.read_text().replace('exec "$FAKE_CLOUD/machine_bin/offsetjax" "$@"', worker))
    cloud.git("commit", "-qam", "the real trainer")
    try:
        training = ("--", f"--config={base / 'config.py'}", "--workdir=gs://bucket/run")
        supervising = cloud.start("supervise", *training, OFFSETJAX_GRACE_SECONDS="600")
        cloud.wait_for(lambda: max(_steps(workdir), default=0) >= 6, 600)
        (pid,) = cloud.root.glob("machines/my-tpu/2/offsetjax/runs/*/pid")
        os.kill(int(pid.read_text()), signal.SIGKILL)
        _, said = supervising.communicate(timeout=900)
        assert supervising.returncode == 0, said
    finally:
        cloud.close()
    assert re.search(r"the training ended with exit status .*137.*; trying again", said), said
    assert (len(cloud.calls("create")), cloud.calls("delete")) == (1, [])  # the slice was whole
    _assert_same(workdir, tmp_path / "straight")
