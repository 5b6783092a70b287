"""Nothing that is printed can hurt: to closed pipes, lost terminals, full disks and readers that have stopped."""

import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from offsetjax import log
from offsetjax.commands.explain import explain
from offsetjax.errors import UserError
from tests.outputs import PLACES, catches, closed_pipe

ROOT = Path(__file__).parents[1]


# A command of its own kind in the place of `train`, in the real program: no JAX, so that it takes a moment.
PROGRAM = """
import logging, os, sys, threading, time, warnings
from offsetjax import cli, log
from offsetjax.commands import training
from offsetjax.errors import PreemptedError, UserError
from offsetjax.parallel import signals

WHAT, READY = os.environ["WHAT"], os.environ["READY"]

def ready():
    with open(READY, "w"):
        pass

def train(options, rest):
    logging.getLogger("offsetjax").info("it begins")
    logging.getLogger("another").error("a library's")
    print("a line on standard output")
    warnings.warn("a warning")
    if WHAT == "mistake":
        raise UserError("what is wrong, where, and the remedy")
    if WHAT == "fault":
        raise ZeroDivisionError
    if WHAT == "done":
        return
    asked = threading.Event()
    if WHAT == "saves":
        number = []
        listener = signals.listener(signals.end, lambda n: (number.append(n), log.say("saves"), asked.set()))
        with signals.heard(listener):
            ready()
            asked.wait()
            with open(READY + ".saved", "w"):
                pass
            raise PreemptedError("after step 7", number[0])
    ready()
    threading.Event().wait()

training._train.__code__ = (lambda options, rest: __import__("__main__").train(options, rest)).__code__
sys.exit(cli.main())
"""


def _start(what: str, ready: Path, err: int | None, out: int | None = None) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", PROGRAM, "train", "--config=a.py", "--workdir=nowhere"]
    if err is None:
        command = ["/bin/sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "WHAT": what,
        "READY": str(ready),
        "TMPDIR": str(ready.parent),
    }
    return subprocess.Popen(command, env=environment, stdout=err if out is None else out, stderr=err)


def _wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 30
    while not path.exists():
        assert process.poll() is None, process.returncode
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("place", PLACES)
def test_an_exit_status_does_not_depend_on_who_reads(place: object, tmp_path: Path) -> None:
    for what, status in (("mistake", 2), ("fault", 70), ("done", 0)):
        with place() as descriptor:  # type: ignore[operator]
            process = _start(what, tmp_path / "ready", descriptor)
            assert process.wait(30) == status, what
    assert len(list(tmp_path.glob("fault_*.txt"))) == 1


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT])
def test_a_signal_is_heard_whoever_reads(place: object, number: int, tmp_path: Path) -> None:
    status = 130 if number == signal.SIGINT else 143
    with place() as descriptor:  # type: ignore[operator]
        process = _start("saves", tmp_path / "ready", descriptor)
        _wait_for(tmp_path / "ready", process)
        process.send_signal(number)
        assert process.wait(30) == status
        assert (tmp_path / "ready.saved").exists()


def test_a_second_signal_ends_what_hangs(tmp_path: Path) -> None:
    with closed_pipe() as descriptor:
        process = _start("hangs in JAX", tmp_path / "ready", descriptor)
        _wait_for(tmp_path / "ready", process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.5, 1.5])  # the last may be after the imports, with a line before
def test_a_signal_from_the_first_lines_on_ends_it_in_one_line(number: int, seconds: float, tmp_path: Path) -> None:
    """In the imports, which take most of a command's first seconds."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "offsetjax", "train", "--config=configs/stamps.py", f"--workdir={tmp_path}/run"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    while not catches(process, signal.SIGTERM):
        time.sleep(0.001)
    time.sleep(seconds)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == (130 if number == signal.SIGINT else 143), err
    *before, last = err.splitlines()
    assert last == f"offsetjax: ended by {signal.Signals(number).name}, with nothing to save"
    assert all(" I 0 configs/stamps.py, " in line for line in before[: 1 if seconds > 1 else 0]) and len(before) <= 1


def test_what_was_to_be_ignored_stays_ignored(tmp_path: Path) -> None:
    """As `nohup` sets it: a training outlives its terminal."""
    with closed_pipe() as descriptor:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            process = _start("saves", tmp_path / "ready", descriptor)
        finally:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
        _wait_for(tmp_path / "ready", process)
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143


def test_who_has_lost_its_parent_ends(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import os, subprocess, sys
        child = subprocess.Popen(sys.argv[1:], env={**os.environ, "OFFSETJAX_PARENT": str(os.getpid())})
        print(child.pid, flush=True)
        child.wait()
        """
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WHAT": "saves", "READY": str(tmp_path / "ready")}
    command = [sys.executable, "-c", script, sys.executable, "-c", PROGRAM, "train", "--config=a.py", "--workdir=run"]
    parent = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    _wait_for(tmp_path / "ready", parent)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 20
    while not (tmp_path / "ready.saved").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert (tmp_path / "ready.saved").exists()
    while Path(f"/proc/{child}").exists() and time.monotonic() < end:
        time.sleep(0.05)


def test_what_comes_from_outside_steers_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    name = "a\x1b]0;title\x07\x9b2J\u202e.png"
    escaped = r"a\x1b]0;title\x07\x9b2J\u202e.png"
    logger = logging.Logger("outside")
    logger.addHandler(log.Handler())
    logger.warning("record 3 (%s) of data is no picture", name)
    log.say(f"error: record 3 ({name}\nof data) is no picture")
    log.show(f"{name}  good", "two\nlines")
    assert explain(UserError(f"model: {name} is missing")) == 2
    assert explain(ZeroDivisionError(name)) == 70
    out, err = capfd.readouterr()
    assert "\x1b" not in out + err and "\x9b" not in out + err and "\u202e" not in out + err
    assert f"W 0 record 3 ({escaped}) of data is no picture\n" in err
    assert f"offsetjax: error: record 3 ({escaped}\\nof data) is no picture\n" in err
    assert f"offsetjax: error: model: {escaped} is missing\n" in err
    assert "Traceback" in err or "ZeroDivisionError" in err
    assert out == f"{escaped}  good\ntwo\nlines\n"
    log.show(name, is_exact=True)
    assert capfd.readouterr().out == f"{name}\n"


def test_a_reader_that_has_gone_ends_no_command(tmp_path: Path) -> None:
    with closed_pipe() as out, (tmp_path / "err").open("wb") as err:
        process = _start("done", tmp_path / "ready", err.fileno(), out)
        assert process.wait(30) == 0
    text = (tmp_path / "err").read_text()
    assert "it begins" in text and "a library's" in text and "a warning" in text
    assert "Traceback" not in text and "Broken pipe" not in text
