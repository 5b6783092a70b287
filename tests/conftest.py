"""Eight virtual CPU devices for the whole suite, so that any test can build a mesh; one store of what is compiled; and
whose warnings are let pass."""

import os
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's threads would fight with XLA's
# Of the processes that tests start too: libtpu, which plans are tested with, complains aloud of a machine without TPUs.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA's older way from a fusion to machine code takes two thirds of the time for the gradient of a small network.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1")

import jax
import pytest
from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep3119Exception
from jaxtyping import install_import_hook
from ml_collections import ConfigDict

from tests.compilation import quick_compilation

# The types and shapes in these rooms' signatures are checked where a test calls or traces them in this process; with
# OFFSETJAX_CHECK_TYPES=1 those of more rooms. An int is a float (PEP 484), a ConfigDict is a mapping, and what takes a
# protocol that cannot be checked is not checked. jaxtyping's hook knows its checker by a name, and goes before imports.
_CHECKED = ("models.tokenizer", "rng", "training.objective")
_CHECKED_TOO = ("diffusion", "models", "parallel", "sampling", "training.abstract", "training.validation")
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def _checked(function: Any) -> Any:
    try:
        return _check(function)
    except BeartypeDecorHintPep3119Exception:
        return function


Mapping.register(ConfigDict)
_checker = types.ModuleType("checker")
_checker.check = _checked  # type: ignore[attr-defined]
sys.modules["checker"] = _checker
_rooms = _CHECKED + (_CHECKED_TOO if os.environ.get("OFFSETJAX_CHECK_TYPES") == "1" else ())
install_import_hook([f"offsetjax.{room}" for room in _rooms], "checker.check")

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# Warnings are errors, but for those that others' code raises about itself.
_THIRD_PARTIES = (
    "ignore::DeprecationWarning:diffusers",
    "ignore::FutureWarning:diffusers",
    "ignore::DeprecationWarning:transformers",
    "ignore::FutureWarning:transformers",
    "ignore::DeprecationWarning:torch",
    "ignore::FutureWarning:torch",
    # One worker reads a compiled program while another writes it: it is compiled once more.
    "ignore:Error reading persistent compilation cache entry:UserWarning",
    # A read that orbax gives up, of a damaged checkpoint, leaves a coroutine that complains when it is collected.
    "ignore:.*_read_array_index_and_device_put:pytest.PytestUnraisableExceptionWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    for line in _THIRD_PARTIES:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session", autouse=True)
def _compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All tests, xdist's workers and the processes that tests start share one store of what was compiled, quickly."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    with pytest.MonkeyPatch.context() as patch, quick_compilation(base) as environment:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield
