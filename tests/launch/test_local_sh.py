"""launch/local.sh, run for real on a tiny project: what it sets up, when again, what it leaves behind when it fails."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

LOCAL_SH = Path(__file__).parents[2] / "launch" / "local.sh"

PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "offsetjax"
version = "0.1.0"

[project.optional-dependencies]
spare = []

[project.scripts]
offsetjax = "offsetjax:main"
"""

# A build backend of the standard library alone, so that these tests ask no package index for anything.
BACKEND = '''
"""Writes an editable wheel, the smallest that pip takes."""

import pathlib
import tomllib
import zipfile

ROOT = pathlib.Path(__file__).parent


def get_requires_for_build_editable(settings=None):
    return []


def build_editable(wheel_directory, settings=None, metadata_directory=None):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    metadata = ["Metadata-Version: 2.1", "Name: offsetjax", "Version: 0.1.0"]
    metadata += [f"Requires-Dist: {name}" for name in project.get("dependencies", [])]
    metadata += [f"Provides-Extra: {name}" for name in project["optional-dependencies"]]
    info = "offsetjax-0.1.0.dist-info"
    files = {
        "offsetjax.pth": f"{ROOT}\\n",
        f"{info}/METADATA": "\\n".join(metadata) + "\\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
        f"{info}/entry_points.txt": "[console_scripts]\\noffsetjax = offsetjax:main\\n",
    }
    record = "".join(f"{name},,\\n" for name in [*files, f"{info}/RECORD"])
    name = "offsetjax-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(pathlib.Path(wheel_directory, name), "w") as wheel:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            wheel.writestr(path, text)
    return name
'''

COMMAND = """
import os
import re
import sys


def main():
    print(os.getpid(), os.getcwd(), *sys.argv[1:], sep="|")
    return 7 if sys.argv[1:] == ["fail"] else 0
"""


class Project:
    """A project at `root` whose command prints its process, its directory and its arguments."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "launch").mkdir(parents=True)
        shutil.copy(LOCAL_SH, root / "launch")
        (root / "launch" / "constraints.txt").write_text("")
        (root / "pyproject.toml").write_text(PYPROJECT)
        (root / "backend.py").write_text(BACKEND)
        (root / "offsetjax.py").write_text(COMMAND)

    def start(self, *args: str, cwd: Path | None = None, **environment: str) -> subprocess.Popen[str]:
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("OFFSETJAX_", "PYTHON"))}
        ours |= {"PYTHON": sys.executable, "OFFSETJAX_EXTRAS": "", "PIP_NO_INDEX": "1"} | environment
        return subprocess.Popen(
            [self.root / "launch" / "local.sh", *args],
            cwd=cwd or self.root,
            env=ours,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *args: str, cwd: Path | None = None, **environment: str) -> tuple[int, str, str]:
        """Returns the exit status, the command's line without its process, and what local.sh had to say."""
        process = self.start(*args, cwd=cwd, **environment)
        out, err = process.communicate(timeout=120)
        return process.returncode, out.partition("|")[2].strip(), err


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    project = Project(tmp_path / "a place with spaces")
    yield project
    shutil.rmtree(project.root)  # an environment each: too much to keep


def test_sets_up_once_and_again_when_the_requirements_change(project: Project, tmp_path: Path) -> None:
    status, line, err = project.run("train", "--config=a b.py")
    assert (status, line) == (0, f"{project.root}|train|--config=a b.py"), err
    assert "setting up .venv (first use" in err
    made = (project.root / ".venv" / "pyvenv.cfg").stat().st_ino

    # From elsewhere, with nothing to do: silent, in the user's own directory, with the command's own exit status.
    assert project.run("fail", cwd=tmp_path) == (7, f"{tmp_path}|fail", "")
    assert project.run("fail", PYTHON="") == (7, f"{project.root}|fail", "")

    # The command takes the place of the script, so that signals reach it.
    process = project.start()
    out, _ = process.communicate(timeout=120)
    assert int(out.split("|")[0]) == process.pid

    # One more extra is installed on top; then fewer are enough.
    status, _, err = project.run(OFFSETJAX_EXTRAS="spare")
    assert (status, "more extras" in err) == (0, True), err
    assert project.run()[2] == ""
    assert (project.root / ".venv" / "pyvenv.cfg").stat().st_ino == made

    with (project.root / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    status, _, err = project.run()
    assert (status, "setting up .venv (an unfinished one or new requirements" in err) == (0, True), err
    assert project.run()[2] == ""


def test_a_failed_set_up_is_not_taken_for_whole(project: Project) -> None:
    pyproject = project.root / "pyproject.toml"
    good = pyproject.read_text()
    pyproject.write_text(good.replace("[project.opt", 'dependencies = ["no-such-thing-as-this"]\n\n[project.opt'))
    for _ in range(2):
        status, line, err = project.run()
        assert (status, line) == (1, "")
        assert "no-such-thing-as-this" in err
        assert str(project.root / ".venv.log") in err

    pyproject.write_text(good)
    status, line, err = project.run()
    assert (status, line) == (0, str(project.root)), err


def test_two_at_once_set_up_once(project: Project) -> None:
    both = [project.start(str(i)) for i in range(2)]
    ends = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    assert [out.strip().rpartition("|")[2] for out, _ in ends] == ["0", "1"]
    assert sum("setting up" in err for _, err in ends) == 1


def test_says_in_one_line_what_it_cannot_do(project: Project, tmp_path: Path) -> None:
    status, _, err = project.run(PYTHON="/nowhere/python3")
    assert (status, err.count("\n")) == (2, 1)
    assert "3.11 to 3.13" in err
    assert "PYTHON=/nowhere/python3" in err

    precious = tmp_path / "precious" / "file"
    precious.parent.mkdir()
    precious.touch()
    status, _, err = project.run(OFFSETJAX_VENV=str(precious.parent))
    assert (status, err.count("\n")) == (2, 1)
    assert precious.exists()


def test_passes_over_a_python_that_does_not_run(project: Project, tmp_path: Path) -> None:
    shims = tmp_path / "shims"
    shims.mkdir()
    for name, body in {"python3.11": "exit 127", "python3.12": f'exec "{sys.executable}" "$@"'}.items():
        (shims / name).write_text(f"#!/bin/sh\n{body}\n")
        (shims / name).chmod(0o755)
    status, line, err = project.run(PYTHON="", PATH=f"{shims}:{os.environ['PATH']}")
    assert (status, line) == (0, str(project.root)), err


# Tells who it is and what it hears; EVENT names a process and the status that it ends with at once.
SEVERAL = """
import os
import re
import signal
import sys
import time


def main():
    who = os.environ.get("JAX_PROCESS_ID", "0")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, lambda number, frame: sys.exit(print("heard", number) or 128 + number))
    several = [os.environ.get(f"JAX_{name}", "") for name in ("NUM_PROCESSES", "PLATFORMS", "COORDINATOR_ADDRESS")]
    print("process", who, "of", *several[:2], *sys.argv[1:], flush=True)
    print(several[2], file=sys.stderr, flush=True)
    if sys.argv[-1] == "wait":
        time.sleep(60)
    if os.path.exists("again"):  # a status a line, one a start
        first, _, rest = open("again").read().partition("\\n")
        open("again", "w").write(rest)
        return int(first or 0)
    statuses = dict(word.split("=") for word in sys.argv if "=" in word)
    return int(statuses.get(who, 0))
"""


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """One project for the tests that only start it."""
    project = Project(tmp_path_factory.mktemp("several") / "a place with spaces")
    (project.root / "offsetjax.py").write_text(SEVERAL)
    yield project
    shutil.rmtree(project.root)


def test_several_processes_know_each_other_and_are_told_apart(several: Project) -> None:
    process = several.start("--processes=3", "train", "0=0")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out == "process 0 of 3 cpu train 0=0\n"
    for index in (1, 2):
        assert f"[{index}] process {index} of 3 cpu train 0=0\n" in err
    addresses = re.findall(r"^(?:\[[12]\] )?(localhost:\d+)$", err, re.MULTILINE)
    assert len(addresses) == 3 and len(set(addresses)) == 1, err

    for command in (("calibrate",), ("data", "encode")):
        process = several.start("--processes=2", *command, "0=0")
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, f"process 0 of 2 cpu {' '.join(command)} 0=0\n"), err

    # A mistake has the first word, then what was saved; otherwise it is the first failure.
    for arguments, status in {
        ("0=74", "1=75"): 74,
        ("0=143", "1=2"): 2,
        ("0=134", "1=143"): 143,
        ("1=137", "2=134"): 137,
    }.items():
        process = several.start("--processes=3", "train", *arguments)
        assert (process.communicate(timeout=120), process.returncode)[1] == status

    for number, everyone in ((signal.SIGTERM, 15), (signal.SIGINT, 2), (signal.SIGHUP, 1), (signal.SIGQUIT, 3)):
        process = several.start("--processes=3", "train", "wait")
        assert process.stdout is not None
        assert process.stderr is not None
        lines = [process.stdout.readline()] + [process.stderr.readline() for _ in range(5)]
        assert sum("of 3" in line for line in lines) == 3
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 128 + number, err
        assert (out + err).count(f"heard {everyone}") == 3


def test_what_may_pass_is_started_again(several: Project) -> None:
    cases = {(75, 70, 137, 0): 0, (75, 2): 2, (74,): 74, (143,): 143, (75,) * 5: 75}
    for statuses, status in cases.items():
        (several.root / "again").write_text("".join(f"{each}\n" for each in statuses))
        process = several.start("--restarts=4", "train", "0=0", OFFSETJAX_PAUSE_SECONDS="0")
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out.count("process 0 of")) == (status, len(statuses)), err
        assert err.count("starting again in 0 s") == len(statuses) - 1
    (several.root / "again").unlink()


@pytest.mark.parametrize("flag", ["--processes=0", "--processes=many", "--processes="])
def test_a_number_of_processes_that_is_none_is_refused(flag: str, project: Project) -> None:
    status, _, err = project.run(flag, "train")
    assert (status, err.count("\n"), "from 1 to 999" in err) == (2, 1, True)


@pytest.mark.parametrize(
    "command", [(), ("test", "-x"), ("export",), ("training",), ("data",), ("data", "build"), ("data encode",), ("",)]
)
def test_what_one_process_does_is_refused_to_several(command: tuple[str, ...], project: Project) -> None:
    status, _, err = project.run("--processes=1", *command)
    assert (status, err.count("\n"), "before train, calibrate or data encode" in err) == (2, 1, True)
    assert not (project.root / ".venv").exists()  # nothing is set up for it
