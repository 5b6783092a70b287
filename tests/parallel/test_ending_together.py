"""Real processes with real signals: how they stop at one step, and end together. The command is the real one, and the
training a stand-in that adds up numbers over all devices, so that each test takes seconds."""

import re
import signal
import time
from pathlib import Path

import pytest

from tests.several import HEARTBEAT_SECONDS, Several

# The loop of offsetjax.train in small. EVENT is "KIND PROCESS STEP": what happens to one process at one step.
COMMAND = """
import os, sys, time, types

def train(config, workdir, *origin):
    import jax, jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec as P
    from offsetjax.errors import PreemptedError, UserError
    from offsetjax.parallel.preemption import Preemption
    from offsetjax.parallel.watchdog import Watchdog

    kind, who, when = os.environ.get("EVENT", "none 0 0").split()
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    ones = jax.make_array_from_callback(mesh.devices.shape, NamedSharding(mesh, P("data")), lambda i: jnp.ones(1)[:])
    total = jax.jit(lambda values, step: values.sum() + step, out_shardings=NamedSharding(mesh, P()))
    with Watchdog(config.train.stall_seconds) as guard, Preemption() as preemption:
        print("starts", flush=True)
        time.sleep(float(os.environ.get("START_SECONDS", "0")))
        if preemption.reached():
            raise PreemptedError("before step 1")
        for step in range(1, config.train.steps + 1):
            if (str(jax.process_index()), str(step)) == (who, when):
                if kind == "mistake":
                    raise UserError("data: record 7 is no picture; build the data again")
                if kind == "crash":
                    raise ZeroDivisionError("a fault of the program")
                if kind == "interrupt":
                    raise KeyboardInterrupt
                if kind == "hang":
                    print("hangs", flush=True)
                    time.sleep(1000)
            assert total(ones, step) == jax.device_count() + step
            guard.progressed()
            print("step", step, flush=True)
            time.sleep(0.05)
            if preemption.reached():
                raise preemption.stopped(f"after step {step}")

stand_in = types.ModuleType("offsetjax.train")
stand_in.train = train
sys.modules["offsetjax.train"] = stand_in
from offsetjax.cli import main
sys.exit(main())
"""

CONFIG = """
from offsetjax.config import default_config

def get_config():
    config = default_config()
    config.data.path = "nowhere"
    return config
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "config.py").write_text(CONFIG)
    return tmp_path / "config.py"


def _start(count: int, config: Path, steps: int = 100_000, stall_seconds: int = 0, **environment: str) -> Several:
    options = [f"--config.train.steps={steps}", f"--config.train.stall_seconds={stall_seconds}"]
    command = ["-c", COMMAND, "train", f"--config={config}", "--workdir=nowhere", *options]
    return Several(count, command, config.parent / "output", **environment)


def _steps(processes: Several, index: int) -> int:
    return sum(line.startswith("step ") for line in processes.output(index).splitlines())


def _wait_for_steps(processes: Several, steps: int = 2) -> None:
    processes.wait_for(lambda: all(_steps(processes, index) >= steps for index in range(len(processes.outputs))))


def test_all_end_when_all_are_done(config: Path) -> None:
    with _start(3, config, steps=5) as processes:
        assert processes.wait(60) == [0, 0, 0], processes.text()
        assert [_steps(processes, index) for index in range(3)] == [5, 5, 5]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_sigterm_to_one_stops_all_at_the_same_step(count: int, config: Path) -> None:
    with _start(count, config) as processes:
        _wait_for_steps(processes)
        processes.send(signal.SIGTERM, count - 1)
        assert processes.wait(30) == [143] * count, processes.text()
        (step,) = {_steps(processes, index) for index in range(count)}
        for index in range(count):
            assert f"ended by SIGTERM after step {step}; the same command resumes" in processes.output(index)


def test_sigterm_before_the_first_step_stops_all(config: Path) -> None:
    with _start(2, config, START_SECONDS="5") as processes:
        processes.wait_for(lambda: all("starts" in processes.output(index) for index in range(2)))
        processes.send(signal.SIGTERM, 1)
        assert processes.wait(30) == [143, 143], processes.text()
        assert [_steps(processes, index) for index in range(2)] == [0, 0]


def test_a_second_signal_ends_all_at_once(config: Path) -> None:
    with _start(2, config, EVENT="hang 1 3") as processes:
        processes.wait_for(lambda: "hangs" in processes.output(1))
        processes.send(signal.SIGTERM, 0)
        processes.wait_for(lambda: "SIGTERM" in processes.output(0))
        processes.send(signal.SIGTERM, 0)  # what a launcher passes on a moment later is the same signal
        time.sleep(1.5)
        assert [process.poll() for process in processes.processes] == [None, None], processes.text()
        processes.send(signal.SIGTERM, 0)
        assert processes.wait(5) == [143, 143], processes.text()
        assert "a second signal: ended at once, nothing more is saved" in processes.output(0)


@pytest.mark.parametrize(
    ("kind", "who", "status", "why"),
    [
        ("mistake", 0, 2, "data: record 7 is no picture; build the data again"),
        ("mistake", 1, 2, "data: record 7 is no picture; build the data again"),
        ("interrupt", 1, 130, "KeyboardInterrupt"),
        ("crash", 1, 70, "a fault of the program"),
    ],
)
def test_what_ends_one_ends_all_with_the_same_status(kind: str, who: int, status: int, why: str, config: Path) -> None:
    with _start(3, config, EVENT=f"{kind} {who} 4") as processes:
        assert processes.wait(60) == [status] * 3, processes.text()
        for index in {0, 1, 2} - {who}:
            assert f"offsetjax: ended, as process {who} was: {why}\n" in processes.output(index)
        assert ("Traceback" in processes.output(who)) == (kind == "crash")


def test_a_mistake_in_the_command_of_one_ends_all(config: Path) -> None:
    command = ["-c", COMMAND, "train", f"--config={config}", "--workdir=nowhere"]
    with Several(2, [command, [*command, "--config.train.steps=many"]], config.parent / "output") as processes:
        assert processes.wait(60) == [2, 2], processes.text()
        assert "ended, as process 1 was: config: train.steps = 'many' is not of type int" in processes.output(0)


def test_a_stall_ends_all_with_what_every_thread_did(config: Path) -> None:
    with _start(2, config, stall_seconds=8, EVENT="hang 1 3") as processes:
        processes.wait_for(lambda: "hangs" in processes.output(1))
        began = time.monotonic()
        assert processes.wait(20) == [75, 75], processes.text()
        assert 7 < time.monotonic() - began < 8.8 + 0.5  # the clock runs since the step before
        assert "no progress for 8 s (train.stall_seconds)" in processes.text()
        for index in range(2):  # also of who waits, wherever that was noticed first
            assert "(most recent call first)" in processes.output(index)
            assert re.search(r", line \d+ in train$", processes.output(index), re.MULTILINE)


@pytest.mark.parametrize("who", [0, 1])
def test_who_loses_a_peer_ends_within_its_heartbeat(who: int, config: Path) -> None:
    with _start(3, config) as processes:
        _wait_for_steps(processes)
        processes.send(signal.SIGKILL, who)
        statuses = processes.wait(HEARTBEAT_SECONDS + 10)
        assert statuses.pop(who) == 137
        assert set(statuses) <= {75, 134}, processes.text()


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_one_that_never_comes_is_waited_for_three_heartbeats(who: int, config: Path) -> None:
    with _start(2, config, OFFSETJAX_HEARTBEAT_SECONDS="5") as processes:
        processes.send(signal.SIGKILL, who)
        statuses = processes.wait(3 * 5 + 20)
        assert (statuses[who], statuses[1 - who]) == (137, 134), processes.text()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "localhost:1"}, "JAX_COORDINATOR_ADDRESS is set but not JAX_NUM_PROCESSES"),
        (
            {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "JAX_PROCESS_ID = 2 of JAX_NUM_PROCESSES = 2: expected a number below the other",
        ),
    ],
)
def test_variables_that_name_no_processes_are_refused(variables: dict[str, str], message: str, config: Path) -> None:
    with _start(1, config, **variables) as processes:
        assert processes.wait(60) == [2]
        assert processes.output(0).startswith(f"offsetjax: error: environment: {message}")
        assert processes.output(0).count("\n") == 1


def test_what_works_in_one_process_says_so_on_a_pod(tmp_path: Path) -> None:
    command = ["-m", "offsetjax", "export", "--workdir=run", "--out=model"]
    with Several(1, command, tmp_path, TPU_WORKER_HOSTNAMES="10.0.0.1,10.0.0.2") as processes:
        assert processes.wait(60) == [2]
        assert processes.output(0).startswith("offsetjax: error: export: works in one process, but this is one of 2;")
