"""Users need no PyTorch and no transformers: the command runs without, and nothing that is installed asks for them."""

import pathlib
import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires

import pytest
from packaging.requirements import Requirement

from tests import tiny
from tests.several import WITHOUT_TORCH

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ONLY_IN_TESTS = {"accelerate", "peft", "torch", "transformers"}


def name_of(text: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", text)[0]).lower()


def installed_with(*requirements: str) -> set[str]:
    """The names of all that these bring, on this platform."""
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        key = name_of(requirement.name), frozenset(requirement.extras)
        if key in seen:
            continue
        seen.add(key)
        extras = ("", *requirement.extras)
        needed = map(Requirement, requires(requirement.name) or ())
        waiting += [
            each
            for each in needed
            if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in extras)
        ]
    return {name for name, _ in seen}


def test_nothing_that_users_install_brings_pytorch_or_transformers() -> None:
    assert not installed_with(*PROJECT["dependencies"]) & ONLY_IN_TESTS


@pytest.mark.skipif(sys.platform != "linux", reason="the versions are pinned for Linux")
def test_the_constraints_pin_each_part_in_its_section() -> None:
    sections = (ROOT / "launch" / "constraints.txt").read_text().split("\n\n# Only the extra ")
    assert [section.split("`")[1] for section in sections[1:]] == ["tpu", "cuda", "test"]
    pinned = [{name_of(line) for line in section.splitlines() if "==" in line} for section in sections]
    extras = PROJECT["optional-dependencies"]
    at_run_time = installed_with(*PROJECT["dependencies"])
    assert pinned[0] == at_run_time
    assert pinned[1] == installed_with(*extras["tpu"]) - at_run_time
    assert pinned[3] == installed_with(*extras["test"]) - at_run_time - pinned[1]


def run(program: str, **environment: str) -> None:
    subprocess.run(
        [sys.executable, "-W", "error::UserWarning:offsetjax", "-c", program],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", **WITHOUT_TORCH, **environment},
        check=True,
        timeout=540,
    )


def test_every_module_is_imported_without_them() -> None:
    run(f"""
import importlib, importlib.util, pkgutil, sys
import offsetjax
assert not any(importlib.util.find_spec(name) for name in {sorted(ONLY_IN_TESTS)})
names = [module.name for module in pkgutil.walk_packages(offsetjax.__path__, "offsetjax.")]
assert len(names) > 100
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
""")


def test_the_command_spends_no_seconds_on_them_where_they_are_installed() -> None:
    """diffusers would import them; they stay to be found by whatever else runs in the process."""
    program = f"""
import importlib.util, sys
import offsetjax
offsetjax.is_program = True
import offsetjax.exporting.export, offsetjax.sampling.sample, offsetjax.training.setup
assert sys.modules.keys().isdisjoint({sorted(ONLY_IN_TESTS)})
assert importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")
"""
    run(program, PYTHONPATH=str(ROOT))


@pytest.mark.slow
def test_training_sampling_and_exports_run_without_them(tmp_path: pathlib.Path) -> None:
    data = tiny.build_data(tmp_path)
    with tiny.quick_compilation(tmp_path) as environment:
        run(
            f"""
from offsetjax import cli
from offsetjax.train import train
from tests import tiny
config = tiny.tiny_config({str(data)!r}, train__steps=1)
train(config, {str(tmp_path / "run")!r})
for arguments in (
    ["sample", "--workdir=RUN", "--prompt=a black square", "--num_steps=1", "--out=OUT/samples"],
    ["export", "--workdir=RUN", "--out=OUT/model"],
):
    arguments = [each.replace("RUN", {str(tmp_path / "run")!r}).replace("OUT", {str(tmp_path)!r}) for each in arguments]
    assert cli.main(arguments) == 0, arguments
""",
            **environment,
        )
    assert (tmp_path / "model" / "tokenizer" / "tokenizer.json").exists()
    assert list((tmp_path / "samples").glob("*.png"))
