"""Arguments of any text through tpu_vm.sh and gke.sh: the command far away receives what was given, or none is run."""

import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.launch.fake_cloud import FLAGS, LAUNCH
from tests.launch.test_gke import MANIFEST, XPK, expanded, pod_of

CONFIG = "--config=/made/by/prepare.py"  # of which nothing can be looked at here
COUNTS = [4, pytest.param(1000, marks=[pytest.mark.chaos, pytest.mark.timeout(3600)])]
ODD = [
    *("", " ", "'", '"', "\\", "\\\\", "$", "$$", "$$$", "$(touch pasted)", "`touch pasted`", "${HOME}", "$((1/0))"),
    *("*", "?", "~", "~root", "!", "!!", "#", "# x", "-", "--", "-n", "-e", "%s", "%n", "&&", "|", ";", "(", ")"),
    *("{a,b}", "a  b", " a", "a ", "'\\''", "\\'", '\\"', "é", "日本", "\U0001f600", "e\u0301", "\u202e", "\ufeff"),
    *("\u200b", "no", "- x", "a: b", "[", "]", "{", "}", "@", "true", "null", "0x1f", "1e3", "${NAME}", "${HOSTS}"),
    *("$(HOME)", "$$(HOME)", "--config.a=('a  b', 'c')", "--config.a=$1", "--dry_run", "--name=x", "--env=x", "train"),
    *("now", "x" * 3000),
]
LETTERS = st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp"))
TEXTS = st.sampled_from(ODD) | st.text(LETTERS, max_size=12)
CONTROLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)


def _lists(texts: st.SearchStrategy[str]) -> st.SearchStrategy[list[str]]:
    fields = st.tuples(texts, texts).map(lambda pair: f"--config.{pair[0]}={pair[1]}")
    lists = st.lists(texts | fields, min_size=1, max_size=8)
    return lists.filter(lambda texts: not any(text.startswith("--workdir=") for text in texts))


LISTS = st.integers(0, 9).flatmap(lambda number: _lists(TEXTS | CONTROLS if number == 9 else TEXTS))


def _said(command: list[str], folder: Path, **variables: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [LAUNCH / command[0], *command[1:]], cwd=folder, env=os.environ | variables, capture_output=True, timeout=60
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def _received(command: str, folder: Path, **variables: str) -> list[str]:
    """What a command's words are once a shell has read it, as it would be read far away."""
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=os.environ | variables, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split("\0")[:-1]


def through_tpu_vm(arguments: list[str], folder: Path) -> list[str] | str:
    """What tpu_worker.sh is called with on a worker; or why nothing is."""
    status, out, err = _said(["tpu_vm.sh", "train", *FLAGS, "--dry_run", "--", *arguments], folder)
    if status:
        return err if (status, out) == (2, "") else f"{status} {out} {err}"
    [line] = [line for line in out.splitlines() if " start " in line]
    [command] = [word for word in shlex.split(line) if word.startswith("--command=")]
    worker = folder / "offsetjax" / "source" / "launch" / "tpu_worker.sh"
    worker.parent.mkdir(parents=True, exist_ok=True)
    worker.write_text("#!/bin/bash\nprintf '%s\\0' \"$@\"\n")
    worker.chmod(0o755)
    start, _, *received = _received(command.removeprefix("--command="), folder, HOME=str(folder))
    assert start == "start"
    return received


def through_manifest(arguments: list[str], folder: Path) -> list[str] | str:
    """The arguments of the container, as Kubernetes expands them."""
    status, out, err = _said(["gke.sh", "manifest", *MANIFEST, "--", *arguments], folder)
    if status:
        return err if (status, out) == (2, "") else f"{status} {out} {err}"
    [container] = pod_of(yaml.safe_load(out))["containers"]
    train, *received = expanded(container["args"])
    assert train == "train"
    return received


def through_xpk(arguments: list[str], folder: Path) -> list[str] | str:
    """The words of the command that xpk's container runs by a shell."""
    status, out, err = _said(["gke.sh", "xpk", "--dry_run", *XPK, "--", *arguments], folder)
    if status:
        return err if (status, out) == (2, "") else f"{status} {out} {err}"
    [command] = [word for word in shlex.split(out) if word.startswith("--command=")]
    train, *received = _received(
        command.removeprefix("--command=").replace("exec offsetjax", "printf '%s\\0'", 1), folder
    )
    assert train == "train"
    return received


@pytest.mark.parametrize("through", [through_tpu_vm, through_manifest, through_xpk])
@pytest.mark.parametrize("count", COUNTS)
def test_what_was_given_is_received(
    count: int, through: Callable[[list[str], Path], list[str] | str], tmp_path: Path
) -> None:
    tried = []

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=count < 100,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(LISTS)
    def check(texts: list[str]) -> None:
        arguments = ["--workdir=gs://bucket/run", CONFIG, *texts]
        received = through(arguments, tmp_path)
        if isinstance(received, str):
            assert re.fullmatch(r"(tpu_vm|gke)\.sh: error: [^\n]*a control character[^\n]*\n", received), received
        else:
            assert received == arguments
        assert not (tmp_path / "pasted").exists()
        tried.append(isinstance(received, str))

    check()
    assert 2 * sum(tried) < len(tried), "most are passed on"
    print(f"\n{through.__name__}: {len(tried)} lists of arguments, {sum(tried)} refused")


def test_all_odd_texts_at_once_are_received(tmp_path: Path) -> None:
    arguments = ["--workdir=gs://bucket/run", CONFIG, *ODD]
    for through in (through_tpu_vm, through_manifest, through_xpk):
        assert through(arguments, tmp_path) == arguments
