"""Every command that writes, on disks that are full, nearly full, read-only or limited, or taken away under it.

One line with the path, what is needed and what there is; status 74; nothing half written; and the same command, once
there is room, does what it does on a good disk.
"""

import contextlib
import itertools
import json
import logging
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from offsetjax import log
from offsetjax.cli import main
from offsetjax.errors import StorageError
from offsetjax.files import write_all
from offsetjax.storage.saving import Saver
from tests import tiny

ROOM = 256 << 20
CONFIG = """
from tests.tiny import run_config

def get_config():
    return run_config({data!r}, sample__every_steps=0)
"""


@dataclass(frozen=True)
class Task:
    """A command, and what it may leave: whole files from which the same command continues."""

    arguments: tuple[str, ...]
    out: str
    continues: tuple[str, ...] = ()


TASKS = {
    "nodes": Task(("export", "--workdir={run}", "--format=comfyui_node"), "nodes.py"),
    "export": Task(("export", "--workdir={run}"), "model"),
    "sample": Task(("sample", "--workdir={run}", "--prompt=a red boat"), "pictures"),
    "report": Task(("report", "--workdir={run}"), "page.html"),
    "sheet": Task(("data", "inspect", "--data={data}"), "sheet.png"),
    "calibrate": Task(("calibrate", "--config={config}"), "c.json"),
    "encode": Task(
        ("data", "encode", "--config={config}"), "latents", ("latents.json", ".array_record-00000-of-00001")
    ),
    "build": Task(("data", "build", "--images={pictures}"), "set", ("build.json", ".array_record-00000-of-00001")),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the commands read."""
    base, folder = tmp_path_factory.getbasetemp(), tmp_path_factory.mktemp("places")
    data = tiny.data_path(base)
    (folder / "config.py").write_text(CONFIG.format(data=str(data)))
    noise = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    (folder / "pictures").mkdir()
    for number, picture in enumerate(noise):
        Image.fromarray(picture).save(folder / "pictures" / f"{number}.png")
        (folder / "pictures" / f"{number}.txt").write_text("noise")
    return {
        "run": str(tiny.trained_workdir(base)),
        "data": str(data),
        "config": str(folder / "config.py"),
        "pictures": str(folder / "pictures"),
    }


class Disk:
    """A file system of its own, in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._binds = folder, 0
        folder.mkdir()
        if self._run("mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(folder)):
            pytest.skip("no tmpfs can be mounted here, which takes root")

    def _run(self, *command: str) -> int:
        return subprocess.run(command, capture_output=True).returncode

    def resize(self, room: int) -> None:
        """Leaves so many bytes free."""
        used = shutil.disk_usage(self.folder).used
        assert not self._run("mount", "-o", f"remount,rw,size={max(4096, used + room)}", str(self.folder))
        if not room:  # of the last page
            with contextlib.suppress(OSError), (self.folder / "ballast").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

    def make_read_only(self) -> None:
        """For all that is opened from now on, also where files are open."""
        assert not self._run("mount", "--bind", str(self.folder), str(self.folder))
        self._binds += 1
        assert not self._run("mount", "-o", "remount,bind,ro", str(self.folder))

    def make_good(self) -> None:
        while self._binds:
            assert not self._run("umount", "-l", str(self.folder))
            self._binds -= 1
        assert not self._run("mount", "-o", f"remount,rw,size={ROOM}", str(self.folder))
        (self.folder / "ballast").unlink(missing_ok=True)

    def close(self) -> None:
        self.make_good()
        assert not self._run("umount", "-l", str(self.folder))

    def contents(self) -> dict[str, int]:
        """The size of each file, by its name in the disk; folders end with a slash."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if name != "ballast":
                found[name if path.is_file() else f"{name}/"] = path.stat().st_size if path.is_file() else 0
        return found


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    try:
        yield disk
    finally:
        disk.close()


@contextlib.contextmanager
def limited(most_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes (RLIMIT_FSIZE, a quota's nearest kin)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def _full(disk: Disk, good: dict[str, int], share: float = 0.0) -> Iterator[None]:
    disk.resize(4096 * int(share * sum(-(-size // 4096) for size in good.values())))
    yield


@contextlib.contextmanager
def _read_only(disk: Disk, good: dict[str, int]) -> Iterator[None]:
    disk.make_read_only()
    yield


@contextlib.contextmanager
def _limited(disk: Disk, good: dict[str, int]) -> Iterator[None]:
    with limited(max(good.values()) // 2):
        yield


FAULTS: dict[str, Callable[..., Any]] = {
    "full": _full,
    "half of the room": lambda disk, good: _full(disk, good, 0.5),
    "nine tenths of the room": lambda disk, good: _full(disk, good, 0.9),
    "read-only": _read_only,
    "a limit on files": _limited,
}
ALL = list(itertools.product(TASKS, FAULTS))
QUICK = [("nodes", "full"), ("nodes", "read-only"), ("sheet", "a limit on files")]


def _argument(name: str, fault: str) -> Any:
    is_quick = (name, fault) in QUICK
    return pytest.param(name, fault, marks=() if is_quick else (pytest.mark.chaos, pytest.mark.timeout(1800)))


def _did(task: Task, places: dict[str, str], out: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """The exit status of the command, and the lines in which it says that something is wrong."""
    capfd.readouterr()
    status = main([*(each.format(**places) for each in task.arguments), f"--out={out}"])
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err + captured.out, captured.err
    return status, [line for line in captured.err.splitlines() if "error: " in line]


def _may_stay(task: Task, name: str) -> bool:
    return bool(task.continues) and name.endswith(("/", *task.continues))


@pytest.mark.parametrize(("name", "fault"), [_argument(*each) for each in ALL])
def test_a_command_says_in_a_line_what_its_disk_lacks_and_works_once_it_does_not(
    name: str,
    fault: str,
    places: dict[str, str],
    disk: Disk,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capfd: pytest.CaptureFixture[str],
) -> None:
    task, out = TASKS[name], disk.folder / TASKS[name].out
    with tiny.quick_compilation(tmp_path_factory.getbasetemp()):
        assert _did(task, places, out, capfd) == (0, [])
        good = disk.contents()
        for path in disk.folder.iterdir():
            (shutil.rmtree if path.is_dir() else Path.unlink)(path)
        with FAULTS[fault](disk, good):
            status, lines = _did(task, places, out, capfd)
        assert (status, len(lines)) == (74, 1), lines
        # A limit on files holds for those in the temporary folder too.
        assert (str(disk.folder) in lines[0] or fault == "a limit on files") and "are free" in lines[0], lines
        left = [each for each in disk.contents() if not _may_stay(task, each)]
        assert not left, "nothing is half written"
        disk.make_good()
        assert _did(task, places, out, capfd) == (0, [])
    assert disk.contents().keys() == good.keys()


def _weights(workdir: Path) -> dict[str, int]:
    return json.loads((workdir / "checkpoints" / "6" / "data" / "metadata").read_text())["checksums"]


def _train(places: dict[str, str], workdir: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    capfd.readouterr()
    absl = logging.getLogger("absl")
    absl.addHandler(handler := log.Handler())  # which the program's own root logger has
    try:
        status = main(["train", f"--config={places['config']}", f"--workdir={workdir}"])
    finally:
        absl.removeHandler(handler)
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err + captured.out, captured.err
    return status, [line for line in captured.err.splitlines() if "error: " in line]


@contextlib.contextmanager
def _at_step_3(act: Callable[[], Any]) -> Iterator[None]:
    is_due = Saver.is_due

    def patched(saver: Saver, step: int) -> bool:
        if step == 3:
            act()
        return is_due(saver, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saver, "is_due", patched)
        yield


MIDWAY: dict[str, Callable[[Disk], Any]] = {
    "filled up": lambda disk: disk.resize(0),
    "made read-only": Disk.make_read_only,
    "taken away": lambda disk: shutil.rmtree(disk.folder / "run"),
}


# Of saves that fail orbax leaves coroutines that complain when they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.chaos
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fault", [*FAULTS, *MIDWAY])
def test_a_training_says_in_a_line_what_its_disk_lacks_and_is_undisturbed_once_it_does_not(
    fault: str, places: dict[str, str], disk: Disk, tmp_path_factory: pytest.TempPathFactory, capfd: Any
) -> None:
    straight, workdir = Path(places["run"]), disk.folder / "run"
    good = {path.name: path.stat().st_size for path in straight.rglob("*") if path.is_file()}
    context = _at_step_3(lambda: MIDWAY[fault](disk)) if fault in MIDWAY else FAULTS[fault](disk, good)
    with tiny.quick_compilation(tmp_path_factory.getbasetemp()):
        with context:
            status, lines = _train(places, workdir, capfd)
        assert (status, len(lines)) == (74, 1), lines
        assert str(workdir) in lines[0], lines
        assert not [each for each in disk.contents() if each.endswith(".unfinished")]
        disk.make_good()
        assert _train(places, workdir, capfd) == (0, [])
    assert _weights(workdir) == _weights(straight)
    assert not [each for each in disk.contents() if "tmp" in each or each.endswith(".unfinished")]


def test_several_files_are_written_or_none_and_what_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    contents = {tmp_path / "old": "new", tmp_path / "made" / "here" / "a": b"a" * 100, tmp_path / "b": b"b" * 9000}
    with (
        limited(4096),
        pytest.raises(StorageError, match=r"/b: File too large \(the 3 files take 9.1 kB, .* free\)"),
    ):
        write_all(contents)
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]
    assert (tmp_path / "old").read_text() == "old"
    write_all(contents)
    assert {path.name for path in tmp_path.rglob("*")} == {"old", "made", "here", "a", "b"}
    assert (tmp_path / "old").read_text() == "new"
