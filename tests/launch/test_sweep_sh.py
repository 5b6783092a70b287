"""launch/sweep.sh: which trainings it runs and skips, what it makes of how they end, and to whom signals go."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests import tiny
from tests.launch.fake_cloud import LAST_STEP, Cloud
from tests.several import WITHOUT_TORCH

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SWEEP = ("--config=sweep.py", "--workdir=runs")

# Lists what the file `listing` holds; trains by writing down its arguments and ending as the file `ends.POINT` says.
LOCAL_SH = r"""#!/usr/bin/env bash
here=$(dirname "$(dirname "$0")")
if [[ $1 == sweep ]]; then
  printf '%s\0' "$@" >"$here/asked"
  cat "$here/listing"
  exit "$(cat "$here/listing_ends" 2>/dev/null || echo 0)"
fi
exec "$here/train" "$here" "$@"
"""
TRAIN = r"""
import os, pathlib, signal, sys, time

here, *arguments = sys.argv[1:]
here = pathlib.Path(here)
(workdir,) = [argument.removeprefix("--workdir=runs/") for argument in arguments if argument.startswith("--workdir=")]
with (here / "trained").open("ab") as file:
    file.write("\0".join(arguments).encode() + b"\n")
ends = here / f"ends.{workdir}"
how = ends.read_text() if ends.exists() else "0"
if how != "hold":
    sys.exit(int(how))
signals = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: signals.append(number))
(here / "holds").touch()
while not signals:
    time.sleep(0.01)
time.sleep(0.3)
(here / "signals").write_text(" ".join(signal.Signals(number).name for number in signals))
sys.exit(143)
"""


def listing(states: Sequence[str], workdir: str = "runs") -> str:
    """What `offsetjax sweep` prints: a point a state, seed=0, seed=1, …"""
    lines = [[state, f"seed={seed}", *training(seed, workdir)] for seed, state in enumerate(states)]
    return "".join("\t".join(line) + "\n" for line in lines)


def training(seed: int, workdir: str = "runs") -> list[str]:
    """The arguments that train a point."""
    place = [f"--workdir={workdir}/seed={seed}", "--config.data.path=it's my data"]
    return ["train", "--config=sweep.py", *place, f"--config.seed={seed}"]


class Checkout:
    """The scripts in a folder of their own, with a local.sh that plays the trainings."""

    def __init__(self, root: Path) -> None:
        self.root = root / "a checkout"
        (self.root / "launch").mkdir(parents=True)
        for name in ("settings.sh", "sweep.sh"):
            shutil.copy(LAUNCH / name, self.root / "launch")
        for name, text in {"launch/local.sh": LOCAL_SH, "train": f"#!{sys.executable} -IS\n{TRAIN}"}.items():
            (self.root / name).write_text(text)
            (self.root / name).chmod(0o755)
        self.has("new", "new", "new")

    def has(self, *states: str) -> None:
        (self.root / "listing").write_text(listing(states))

    def start(self, *args: str) -> subprocess.Popen[str]:
        command = [str(self.root / "launch" / "sweep.sh"), *SWEEP, *args]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True, cwd=self.root)

    def run(self, *args: str) -> tuple[int, str, str]:
        process = self.start(*args)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def trained(self) -> list[list[str]]:
        """The arguments of each training, in their order."""
        file = self.root / "trained"
        return [line.split("\0") for line in file.read_text().splitlines()] if file.exists() else []

    def seeds(self) -> list[int]:
        return [int(arguments[-1].removeprefix("--config.seed=")) for arguments in self.trained()]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def wait_for(what: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def test_what_is_not_done_is_trained_in_turn(checkout: Checkout) -> None:
    checkout.has("done", "step 3 of 9", "new")
    status, out, err = checkout.run("--config.data.path=it's my data")
    assert (status, out) == (0, ""), err
    assert "1 trainings are done, 2 are left" in err
    assert checkout.trained() == [training(1), training(2)]
    asked = (checkout.root / "asked").read_text().split("\0")
    assert asked == ["sweep", *SWEEP, "--config.data.path=it's my data", ""]

    checkout.has("done", "done", "done")
    assert checkout.run()[0] == 0
    assert len(checkout.trained()) == 2


@pytest.mark.parametrize(
    ("ends", "status", "seeds", "says"),
    [
        ("1", 1, [0, 1, 2], "error: seed=1: failed with exit status 1; the others continue"),
        ("137", 1, [0, 1, 2], "error: seed=1: failed with exit status 137; the others continue"),
        ("75", 1, [0, 1, 2], "error: seed=1: failed with exit status 75; the others continue"),
        ("2", 2, [0, 1], "error: seed=1: a mistake, see above; no more trainings are begun"),
        ("143", 143, [0, 1], "seed=1: ended; the same command resumes"),
        ("130", 130, [0, 1], "seed=1: ended; the same command resumes"),
    ],
)
def test_how_a_training_ends_decides_on_the_others(
    checkout: Checkout, ends: str, status: int, seeds: list[int], says: str
) -> None:
    (checkout.root / "ends.seed=1").write_text(ends)
    got, _, err = checkout.run()
    assert (got, checkout.seeds(), says in err) == (status, seeds, True), err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_the_training_save_and_ends_the_sweep(checkout: Checkout, number: int, status: int) -> None:
    (checkout.root / "ends.seed=1").write_text("hold")
    process = checkout.start()
    wait_for((checkout.root / "holds").exists)
    os.killpg(process.pid, number)  # as Ctrl-C does: the training hears of it once nonetheless
    _, err = process.communicate(timeout=60)
    assert (process.returncode, checkout.seeds()) == (status, [0, 1]), err
    assert (checkout.root / "signals").read_text() == "SIGTERM"


def test_the_list_shows_the_states(checkout: Checkout) -> None:
    checkout.has("done", "step 3 of 9", "new")
    status, out, err = checkout.run("--list")
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "done               seed=0", "step 3 of 9        seed=1", "new                seed=2"
    ]  # fmt: skip
    _, out, _ = checkout.run("--list", "--slices", "--name=a")
    assert out.splitlines()[0] == "done               seed=0   a-seed-0"
    assert checkout.trained() == []


def test_a_dry_run_prints_commands_that_can_be_pasted(checkout: Checkout) -> None:
    checkout.has("done", "new", "new")
    status, out, err = checkout.run("--dry_run")
    assert (status, err, checkout.trained()) == (0, "", [])
    subprocess.run(["sh", "-euc", out], check=True, timeout=60)
    assert [arguments[3] for arguments in checkout.trained()] == ["--config.data.path=it's my data"] * 2
    assert checkout.seeds() == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--env=my.env"], "the flags of tpu_vm.sh are for slices: add --slices"),
        (["--name=a"], "are for slices"),
        (["--at_once=2"], "are for slices"),
        (["--delete"], "are for slices"),
        (["--slices"], "--name is missing"),
        (["--slices", "--name=a", "--at_once=0"], "--at_once=0: expected something like 4"),
        (["--lst"], "unknown argument --lst"),
        (["runs"], "unknown argument runs"),
        (["--config.seed"], "unknown argument --config.seed"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(checkout: Checkout, arguments: list[str], says: str) -> None:
    status, out, err = checkout.run(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("sweep.sh: error: ")
    assert says in err
    assert not (checkout.root / "asked").exists()


def test_a_bad_sweep_trains_nothing(checkout: Checkout) -> None:
    for status in (2, 1):
        (checkout.root / "listing_ends").write_text(str(status))
        assert checkout.run()[0] == status
    assert checkout.trained() == []


FLAGS = ("--slices", "--name=sw", "--zone=us-west4-a", "--accelerator_type=v5litepod-8")


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    cloud = Cloud(tmp_path)
    cloud.plan["states"] = [["ACTIVE"]]
    cloud.file("listing").write_text(listing(["new", "done", "new", "step 3 of 9"], "gs://bucket/runs"))
    yield cloud
    cloud.close()


def sweep(cloud: Cloud, *args: str) -> tuple[int, str, str]:
    process = cloud.start_script("sweep.sh", *SWEEP, *FLAGS, *args)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def steps(cloud: Cloud, seed: int) -> list[int]:
    [file] = cloud.root.glob(f"gs/bucket/runs/seed={seed}/steps.*")
    return [int(step) for step in file.read_text().split()]


def test_each_training_has_a_slice_of_its_own(cloud: Cloud) -> None:
    status, out, err = sweep(cloud, "--delete")
    assert (status, out) == (0, ""), err
    for seed in (0, 2, 3):
        assert steps(cloud, seed) == list(range(1, LAST_STEP + 1))
        arguments = cloud.file(f"arguments.sw-seed-{seed}.0").read_text().split("\0")
        assert arguments == [*training(seed, "gs://bucket/runs"), ""]
        assert f"sw-seed-{seed}: tpu_vm.sh: sw-seed-{seed} is deleted" in err
    assert not list(cloud.file("machines").iterdir())
    assert "sw-seed-1: tpu_vm.sh: there is no sw-seed-1" in err
    assert [call[3] for call in cloud.calls("sw-seed-1")] == ["describe", "describe"]  # busy? there?


def test_the_slice_of_a_training_that_was_done_before_is_given_back_first(cloud: Cloud) -> None:
    cloud.do("create", "--name=sw-seed-1")
    assert sweep(cloud)[0] == 0
    assert not cloud.calls("delete")
    before = len(cloud.calls())
    status, _, err = sweep(cloud, "--delete", "--at_once=1")
    assert (status, "1 trainings are done, 3 are left" in err, "seed=0: training 1 of 3" in err) == (0, True, True), err
    assert cloud.calls()[before][3:5] == ["describe", "sw-seed-1"]
    assert not list(cloud.file("machines").iterdir())


@pytest.mark.parametrize(("reason", "expected", "says"), [
    ("UNAVAILABLE: later", 1, "failed with exit status 1; the others continue; the same command tries it again"),
    ("PERMISSION_DENIED: no", 2, "a mistake, see above; no more trainings are begun"),
])  # fmt: skip
def test_a_slice_that_is_not_given_back_is_told_and_tried_again(
    cloud: Cloud, reason: str, expected: int, says: str
) -> None:
    cloud.file("listing").write_text(listing(["new"], "gs://bucket/runs"))
    cloud.plan["refuse_delete"] = reason
    status, _, err = sweep(cloud, "--delete")
    assert status == expected, err
    assert f"error: seed=0: done, but its slice sw-seed-0 is not deleted, and billed: {says}" in err
    cloud.plan["refuse_delete"] = ""
    cloud.file("listing").write_text(listing(["done"], "gs://bucket/runs"))
    assert sweep(cloud, "--delete")[0] == 0
    assert not list(cloud.file("machines").iterdir())
    assert steps(cloud, 0) == list(range(1, LAST_STEP + 1))


def test_a_slice_that_is_at_work_for_another_is_not_given_back(cloud: Cloud) -> None:
    cloud.be_ready("--name=sw-seed-1")
    folder = cloud.file("gs/bucket/another")
    folder.mkdir(parents=True)
    (folder / "hold").touch()
    cloud.do("train", "--name=sw-seed-1", "--", "--config=configs/a.py", "--workdir=gs://bucket/another")
    cloud.file("listing").write_text(listing(["done"], "gs://bucket/runs").replace("seed=0", "seed=1"))
    status, _, err = sweep(cloud, "--delete")
    assert (status, "error: sw-seed-1 is busy with another run" in err) == (1, True), err
    assert not cloud.calls("delete")
    cloud.plan["drop"] = {"worker": "sw-seed-1/0", "word": "status", "when": "before"}  # what it does cannot be known
    assert sweep(cloud, "--delete")[0] == 1
    assert not cloud.calls("delete")
    cloud.plan["drop"] = None
    (folder / "hold").unlink()
    cloud.wait_for(lambda: "is running" not in cloud.do("status", "--name=sw-seed-1"))
    assert sweep(cloud, "--delete")[0] == 0
    assert not list(cloud.file("machines").iterdir())


def test_no_more_slices_than_asked_for_at_the_same_time(cloud: Cloud) -> None:
    assert sweep(cloud, "--delete", "--at_once=1")[0] == 0
    verbs = [(call[3], call[4]) for call in cloud.calls("queued-resources") if call[3] in ("create", "delete")]
    assert verbs == [(verb, f"sw-seed-{seed}") for seed in (0, 2, 3) for verb in ("create", "delete")]


@pytest.mark.parametrize(("exits", "flag", "expected"), [("2", "", 2), ("1", "--max_restarts=0", 1)])
def test_one_fails_and_the_others_go_on(cloud: Cloud, exits: str, flag: str, expected: int) -> None:
    folder = cloud.file("gs/bucket/runs/seed=2")
    folder.mkdir(parents=True)
    (folder / "exits.sw-seed-2.0").write_text(exits)
    status, _, err = sweep(cloud, *filter(None, [flag]))
    assert status == expected, err
    assert [line for line in err.splitlines() if "sweep.sh: error: seed=2: " in line]
    for seed in (0, 3):
        assert steps(cloud, seed)[-1] == LAST_STEP
    assert list(cloud.file("machines").iterdir())  # without --delete they stay


def test_a_signal_ends_the_watching_and_the_same_command_goes_on(cloud: Cloud) -> None:
    for seed in (0, 2, 3):
        cloud.file(f"gs/bucket/runs/seed={seed}").mkdir(parents=True)
        cloud.file(f"gs/bucket/runs/seed={seed}/hold").touch()
    process = cloud.start_script("sweep.sh", *SWEEP, *FLAGS)
    wait_for(lambda: len(list(cloud.root.glob("arguments.*"))) == 3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "the trainings on slices continue" in err
    process = cloud.start_script("sweep.sh", *SWEEP, *FLAGS)
    watched = 0
    while watched < 3:
        line = process.stderr.readline()
        assert line, "it ended"
        watched += "following run" in line
    for hold in cloud.root.glob("gs/bucket/runs/*/hold"):
        hold.unlink()
    process.communicate(timeout=60)
    assert process.returncode == 0
    for seed in (0, 2, 3):
        assert steps(cloud, seed) == list(range(1, LAST_STEP + 1))  # nothing was begun twice


def test_a_dry_run_prints_a_command_a_slice(cloud: Cloud) -> None:
    status, out, err = sweep(cloud, "--dry_run", "--delete", "--env=my.env")
    assert (status, err, cloud.calls()) == (0, "", [])
    lines = [shlex.split(line) for line in out.splitlines()]
    assert (lines[0][1], lines[0][5]) == ("delete", "--name=sw-seed-1")  # done before
    del lines[0]
    assert [line[1] for line in lines] == ["supervise", "delete"] * 3
    flags = ["--zone=us-west4-a", "--accelerator_type=v5litepod-8", "--env=my.env", "--name=sw-seed-0"]
    assert lines[0][2:6] == lines[1][2:6] == flags
    assert lines[0][6:8] == ["--", "--config=sweep.py"]
    assert lines[1][6:] == ["--yes"]


def test_slices_names_are_those_that_google_cloud_takes(cloud: Cloud) -> None:
    points = ["learning_rate=1e-05,rank=4", "prompts=A-Night-" + "x" * 80, "prompts=A-Night-" + "x" * 79]
    cloud.file("listing").write_text("".join(f"new\t{point}\ttrain\t--workdir=gs://b/{point}\n" for point in points))
    _, out, _ = sweep(cloud, "--list")
    names = [line.split()[-1] for line in out.splitlines()]
    assert names[0] == "sw-learning-rate-1e-05-rank-4"
    assert len(set(names)) == 3
    assert all(re.fullmatch("[a-z]([a-z0-9-]{0,48}[a-z0-9])", name) for name in names)
    cloud.file("listing").write_text("".join(f"new\tx={x}\ttrain\t--workdir=gs://b/{x}\n" for x in ("1e-5", "1e+5")))
    status, _, err = sweep(cloud)
    assert (status, err.splitlines()[-1]) == (
        2,
        "sweep.sh: error: two slices would be called sw-x-1e-5: run these points apart",
    )
    assert cloud.calls() == []


GRID = """
from tests import tiny

def get_config():
    config = tiny.tiny_config(train__steps=20, checkpoint__every_steps=5)
    config.sample.update(every_steps=10, prompts=tiny.CAPTIONS[:2])
    return config

def get_grid():
    return {"noise.offset_strength": (0.0, 0.2), "seed": (0, 1)}
"""


@pytest.mark.slow
def test_two_by_two_trainings_ended_in_the_middle_resumed_and_reported(tmp_path: Path) -> None:
    data = tiny.build_data(tmp_path)
    (tmp_path / "sweep.py").write_text(GRID)
    (tmp_path / "launch").mkdir()
    for name in ("settings.sh", "sweep.sh"):
        shutil.copy(LAUNCH / name, tmp_path / "launch")
    local_sh = tmp_path / "launch" / "local.sh"
    local_sh.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m offsetjax "$@"\n')
    local_sh.chmod(0o755)
    arguments = [f"--config={tmp_path}/sweep.py", f"--workdir={tmp_path}/runs", f"--config.data.path={data}"]
    with tiny.quick_compilation(tmp_path) as quick:
        env = os.environ | quick | WITHOUT_TORCH | {"JAX_PLATFORMS": "cpu"}

        def start(*flags: str) -> subprocess.Popen[str]:
            command = [str(tmp_path / "launch" / "sweep.sh"), *arguments, *flags]
            return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

        process = start()
        second = tmp_path / "runs" / "offset_strength=0.0,seed=1" / "metrics.jsonl"
        wait_for((second.parent / "checkpoints" / "5").exists, 300)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 143, err
        out, err = start("--list").communicate(timeout=300)
        states = re.fullmatch(r"done +\S+seed=0\nstep (\d+) of 20 +\S+seed=1\nnew +\S+seed=0\nnew +\S+seed=1\n", out)
        assert states, out + err
        assert 5 <= int(states[1]) < 20

        process = start()
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        assert f"resuming {second.parent} at step {states[1]}" in err
        assert "1 trainings are done, 3 are left" in err
        assert len(list((tmp_path / "runs").glob("*/checkpoints/20"))) == 4

    steps = [json.loads(line)["step"] for line in second.read_text().splitlines()]
    assert steps == list(range(1, 21))
    command = [sys.executable, "-m", "offsetjax", "report", f"--workdir={tmp_path}/runs", f"--out={tmp_path}/page.html"]
    subprocess.run(command, env=env, check=True, timeout=300)
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert [pool["name"] for pool in numbers["pools"]] == [f"offset_strength={x} (2 seeds)" for x in ("0.0", "0.2")]
    assert set(numbers["config_differences"]) == {"noise.offset_strength", "seed"}
    assert (tmp_path / "page_files" / "swept.png").exists()
