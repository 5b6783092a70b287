"""The real trainer in several processes of this machine: how it is started, and what its work directory holds."""

import functools
import json
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.several import HEARTBEAT_SECONDS, Several
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


class Pod:
    """Trainings of one config."""

    def __init__(self, base: Path) -> None:
        self._base = base
        base.mkdir()
        self.data = build_data(base)
        settings = {"data": str(self.data), "steps": STEPS, "every": SAVED_EVERY, "prompts": CAPTIONS[:1]}
        self.config = base / "config.py"
        self.config.write_text(CONFIG.format(**settings))
        with quick_compilation(base) as variables:
            self.environment = variables

    def train(
        self,
        workdir: Path | str,
        count: int = 2,
        *options: str,
        output: Path | None = None,
        devices: int = 2,
        program: Sequence[str] = ("-m", "tests.launch.pod_main"),
        **variables: str,
    ) -> Several:
        """Starts a training in `count` processes, with `devices` in all.

        Args:
            output: a folder for what they print; beside a local work directory without it.
            program: what follows `python`, before the command.
            variables: of the environment.
        """
        command = [*program, "train", f"--config={self.config}", f"--workdir={workdir}", *options]
        output = output or Path(f"{workdir} output")
        return Several(count, command, output, max(1, devices // count), **(self.environment | variables))

    @functools.cache  # noqa: B019
    def straight(self, count: int = 2, devices: int = 2) -> Path:
        """The undisturbed training; each is run once."""
        workdir = self._base / f"straight {count} {devices}"
        with self.train(workdir, count, devices=devices) as processes:
            assert processes.wait(600) == [0] * count, processes.text()
        return workdir


@functools.cache
def _pod(base: Path) -> Pod:
    return Pod(base / "pod")


def pod_of(tmp_path_factory: pytest.TempPathFactory) -> Pod:
    """One for all tests of a session."""
    return _pod(tmp_path_factory.getbasetemp())


def steps_of(workdir: Path) -> dict[int, tuple[str, str]]:
    """The loss and the gradient's norm of each step, in hex."""
    file = workdir / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    assert len({line["step"] for line in lines if "loss" in line}) == sum("loss" in line for line in lines)
    return {line["step"]: (line["loss"].hex(), line["grad_norm"].hex()) for line in lines if "loss" in line}


def watched(workdir: Path) -> list[dict[str, Any]]:
    """What its watches saw."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{**line, "time_seconds": 0, "crc": ""} for line in lines if "loss" not in line]


def committed(workdir: Path) -> list[int]:
    """The steps that are saved."""
    return sorted(int(folder.name) for folder in (workdir / "checkpoints").glob("*") if folder.name.isdecimal())


def _checksums(workdir: Path, step: int) -> dict[str, int]:
    """The checksums of all parameters, moments and averages when they were saved."""
    return json.loads((workdir / "checkpoints" / str(step) / "data" / "metadata").read_text())["checksums"]


def assert_same(workdir: Path, straight: Path) -> None:
    """Each step, each look and all weights are those of the undisturbed training, bit for bit."""
    assert steps_of(workdir) == steps_of(straight)
    assert watched(workdir) == watched(straight)
    assert _checksums(workdir, STEPS) == _checksums(straight, STEPS)


def resumed_at(processes: Several) -> int:
    """The step from which these processes resume; 0 where they have not said so."""
    found = re.search(r"resuming .* at step (\d+)", processes.output(0))
    return int(found[1]) if found else 0


def last_step(processes: Several) -> int:
    """The last step that these processes, and none before them, have told of."""
    return max(map(int, re.findall(r" step (\d+)/", processes.output(0), re.MULTILINE)), default=0)


@dataclass(frozen=True)
class Moment:
    """When which process is killed: so many seconds after something can be seen, of the processes or in the folder."""

    who: int
    after: Callable[[Several, Path], bool]
    seconds: float = 0.0


def started(processes: Several, workdir: Path) -> bool:
    """At once."""
    return True


def said(words: str) -> Callable[[Several, Path], bool]:
    """Once the first process has printed these words."""
    return lambda processes, workdir: words in processes.output(0)


def at_step(step: int) -> Callable[[Several, Path], bool]:
    """Once it has told of a step."""
    return lambda processes, workdir: last_step(processes) >= step


def saving(step: int) -> Callable[[Several, Path], bool]:
    """While a step is being saved."""
    return lambda processes, workdir: last_step(processes) >= step and str(step) in _unfinished(workdir)


def _unfinished(workdir: Path) -> list[str]:
    """The steps of which a save has begun, and not come to its end."""
    return [folder.name.partition(".")[0] for folder in (workdir / "checkpoints").glob("*.*tmp*")]


def _kill(processes: Several, workdir: Path, moment: Moment) -> int:
    """Kills one process; returns the last step that was committed then."""
    began = time.monotonic()
    processes.wait_for(lambda: moment.after(processes, workdir))
    time.sleep(moment.seconds)
    processes.send(signal.SIGKILL, moment.who)
    killed, saved, unfinished = time.monotonic(), max(committed(workdir), default=0), _unfinished(workdir)
    statuses = processes.wait(3 * HEARTBEAT_SECONDS + 10)  # so long is one waited for that has not come yet
    print(
        f"process {moment.who} killed after {killed - began:.1f} s and step {last_step(processes)}, with {saved} "
        f"committed and {unfinished} unfinished; {statuses} after {time.monotonic() - killed:.1f} s"
    )
    assert statuses.pop(moment.who) == 137, processes.text()
    assert set(statuses) <= {75, 134}, processes.text()
    return saved


def assert_kills_lose_nothing(
    moments: list[Moment], pod: Pod, workdir: Path, count: int = 2, saved: int = 0, **variables: str
) -> None:
    """Kills a training, of which so many steps are saved, at one moment after the other; it ends as undisturbed."""
    straight = pod.straight(count)
    for moment in moments:
        with pod.train(workdir, count, **variables) as processes:
            before, saved = saved, _kill(processes, workdir, moment)
            assert saved >= before
            assert resumed_at(processes) >= before or not last_step(processes)
    with pod.train(workdir, count, **variables) as processes:
        assert processes.wait(600) == [0] * count, processes.text()
        assert resumed_at(processes) >= saved
    assert_same(workdir, straight)
