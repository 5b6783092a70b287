"""The house is in order: each room imports only what stands below it, and nothing lies about at the top level."""

import ast
import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "offsetjax"


def _floors() -> dict[str, int]:
    """How high each room of README's map stands, the highest first there; the last line is one floor, of the ground."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("## The map of the house\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^    (\w+(?:\.py|/)) .*$", section, re.MULTILINE)
    floors = {name.strip("/").removesuffix(".py"): height for height, name in enumerate(reversed(lines))}
    ground = re.findall(r"^    (?:\w+\.py ?)+$", section, re.MULTILINE)
    return floors | {name.removesuffix(".py"): 0 for line in ground for name in line.split()}


def _imported(file: pathlib.Path) -> set[str]:
    """The rooms that a module imports, anywhere in it."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "offsetjax":
            modules |= {f"offsetjax.{each.name}" for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
    return {module.split(".")[1] for module in modules if module.startswith("offsetjax.")}


def test_no_room_imports_what_stands_above_it() -> None:
    floors = _floors()
    assert len(floors) > 20
    upwards = []
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).parts
        room = parts[0].removesuffix(".py")
        if room.startswith("__"):
            continue
        higher = {other for other in _imported(file) if floors[other] > floors[room]}
        upwards += [f"{'/'.join(parts)} imports {other}" for other in sorted(higher)]
    assert upwards == []


def _check(folder: pathlib.Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ROOT / ".ci" / "top_level"], cwd=folder, capture_output=True, text=True, check=False)


def test_what_does_not_belong_at_the_top_level_is_named(tmp_path: pathlib.Path) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    for name in ("README.md", ".gitignore", "offsetjax/cli.py", "tests/test_cli.py"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("/ignored/\n")
    (tmp_path / "ignored").mkdir()
    (tmp_path / "ignored" / "file").touch()
    assert _check(tmp_path).returncode == 0
    (tmp_path / "no" / "such").mkdir(parents=True)
    (tmp_path / "no" / "such" / "plan.json").touch()  # as a test once left it
    found = _check(tmp_path)
    assert (found.returncode, found.stderr) == (1, "does not belong at the top level: no\n")
    subprocess.run(["git", "add", "-A"], cwd=tmp_path, check=True)
    assert _check(tmp_path).returncode == 1, "committed, it belongs no more than before"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_nothing_else_lies_at_our_top_level() -> None:
    assert _check(ROOT).stderr == ""


# Who prints: the one place for what a command was asked for, and the process that answers another in JSON.
PRINTS = {"offsetjax/log.py", "offsetjax/plan/worker.py"}


def test_what_a_command_says_goes_through_one_place() -> None:
    printing = {
        str(file.relative_to(ROOT))
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert printing == PRINTS
