"""Eight virtual CPU devices for the whole suite, so that any test can build a mesh; one store of what is compiled; and
whose warnings are let pass."""

import os
import sys
import types
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's threads would fight with XLA's
# Of the processes that tests start too: libtpu, which plans are tested with, complains aloud of a machine without TPUs.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

from tests.compilation import quick_compilation

# OFFSETJAX_CHECK_TYPES=1 checks the types and shapes in these rooms' signatures where a test calls or traces in this
# process; an int is a float (PEP 484). jaxtyping's hook knows its checker by a name, and goes before their import.
_CHECKED = ("diffusion", "models.attention", "models.tokenizer")
if os.environ.get("OFFSETJAX_CHECK_TYPES") == "1":
    _checker = types.ModuleType("checker")
    _checker.check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # type: ignore[attr-defined]
    sys.modules["checker"] = _checker
    install_import_hook([f"offsetjax.{room}" for room in _CHECKED], "checker.check")

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
