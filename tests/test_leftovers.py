"""What killed commands leave: folders, half-written exports, and processes that nobody waits for."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from etils import epath

from offsetjax.leftovers import temporary_prefix, unfinished_name

ROOT = Path(__file__).parents[1]


@pytest.fixture
def ended() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_temporary_folders_of_killed_processes_are_removed(
    ended: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kept = [
        f"offsetjax_shard_{os.getpid()}_a",
        "offsetjax_shard_x_a",
        f"offsetjax_plan_{ended}_a",
        f"other_shard_{ended}_a",
    ]
    for name in (f"offsetjax_shard_{ended}_abc", *kept):
        (tmp_path / name / "sub").mkdir(parents=True)
    assert temporary_prefix("shard") == f"offsetjax_shard_{os.getpid()}_"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_half_written_exports_of_killed_processes_are_removed(
    ended: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = epath.Path(tmp_path) / "model.v1.safetensors"
    mine = unfinished_name(out)
    dead = tmp_path / mine.name.replace(str(os.getpid()), str(ended))
    elsewhere = tmp_path / f".{out.name}.another-host-{ended}.unfinished.safetensors"
    other = tmp_path / f".other.safetensors.host-{ended}.unfinished.safetensors"
    for file in (tmp_path / mine.name, dead, elsewhere, other):
        file.write_text("half")
    assert unfinished_name(out) == mine
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([mine.name, elsewhere.name, other.name])
    assert "half written, by a process on another-host" in caplog.text


WORKERS = """
import multiprocessing, sys, time

def work(file):
    from offsetjax.parallel.signals import end_with_parent
    end_with_parent()
    print(multiprocessing.current_process().pid, flush=True)
    time.sleep(60)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    for number in range(2):
        context.Process(target=work, args=(sys.argv[1],), daemon=True).start()
    time.sleep(60)
"""


def test_helpers_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(WORKERS)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    helpers = [int(process.stdout.readline()) for _ in range(2)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    end = time.monotonic() + 10
    while any(_lives(helper) for helper in helpers) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [helper for helper in helpers if _lives(helper)]


def _lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
