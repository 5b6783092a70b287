"""One training a work directory: a second is refused, a dead one is not waited for, none writes beside another."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from offsetjax.errors import UserError
from offsetjax.storage import lock
from offsetjax.storage.lock import WorkdirLock
from tests.launch.fake_bucket import BUCKET, bucket, run_on

HOLD = """
import sys, time
from offsetjax.storage import lock
lock.BEAT_SECONDS = 0.2
with lock.WorkdirLock(sys.argv[1], lost=lambda why: print(why, flush=True)) as held:
    held.acquire()
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("BEAT_SECONDS", 0.2), ("STALE_SECONDS", 2.0), ("_SETTLE_SECONDS", 0.1)):
        monkeypatch.setattr(lock, name, seconds)


def _held_elsewhere(workdir: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(workdir)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_a_second_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    process = _held_elsewhere(tmp_path)
    began = time.monotonic()
    with (
        WorkdirLock(tmp_path, lost=print) as second,
        pytest.raises(UserError, match=rf"in use by another training \(process {process.pid} on .*, since 20"),
    ):
        second.acquire()
    assert time.monotonic() - began < 1.5
    assert json.loads((tmp_path / "lock.json").read_text())["process"] == process.pid
    _end(process)


def test_one_that_was_killed_is_not_waited_for(tmp_path: Path) -> None:
    _end(_held_elsewhere(tmp_path))
    began = time.monotonic()
    with WorkdirLock(tmp_path, lost=print) as second:
        second.acquire()
        assert time.monotonic() - began < 1.0
        assert json.loads((tmp_path / "lock.json").read_text())["process"] == os.getpid()
    assert not (tmp_path / "lock.json").exists()


def test_one_on_another_machine_that_is_silent_is_taken_over(tmp_path: Path) -> None:
    _end(_held_elsewhere(tmp_path))
    file = tmp_path / "lock.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "machine": "another"}))
    began = time.monotonic()
    with WorkdirLock(tmp_path, lost=print) as second:
        second.acquire()
    assert 2.0 <= time.monotonic() - began < 4.0


def test_one_that_wakes_up_beside_its_successor_ends_and_writes_no_more(tmp_path: Path) -> None:
    process = _held_elsewhere(tmp_path)
    process.send_signal(19)  # SIGSTOP
    with WorkdirLock(tmp_path, lost=print) as second:
        second.acquire()
        process.send_signal(18)  # SIGCONT
        assert process.stdout is not None
        assert f"was taken over by process {os.getpid()} on" in process.stdout.readline()
        time.sleep(0.5)
        second.check()
        _end(process)


def test_a_holder_that_lost_it_is_told_before_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 60.0)
    with WorkdirLock(tmp_path, lost=print) as first:
        first.acquire()
        first.check()
        file = tmp_path / "lock.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "token": "another", "host": "there"}))
        with pytest.raises(UserError, match=r"taken over by process .* on there"):
            first.check()
    assert file.exists()  # it is the other's


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"token": 1}'])
def test_a_damaged_lock_stops_nobody(text: str, tmp_path: Path) -> None:
    (tmp_path / "lock.json").write_text(text)
    with WorkdirLock(tmp_path, lost=print) as first:
        first.acquire()


ON_A_BUCKET = """
import sys
from offsetjax.errors import UserError
from offsetjax.storage import lock
lock.BEAT_SECONDS, lock.STALE_SECONDS, lock._SETTLE_SECONDS = 0.2, 2.0, 0.2
with lock.WorkdirLock(sys.argv[1], lost=print) as first:
    first.acquire()
    with lock.WorkdirLock(sys.argv[1], lost=print) as second:
        try:
            second.acquire()
        except UserError as error:
            print(error)
"""


def test_a_lock_on_a_bucket_is_one(tmp_path: Path) -> None:
    with bucket() as store:
        said = run_on(store, ON_A_BUCKET, f"gs://{BUCKET}/run", cwd=tmp_path)
        assert "gs://bucket/run is in use by another training (process " in said
        assert "run/lock.json" not in store.objects
