"""The scripts of `launch/`, which are no modules of the package."""

import importlib.util
import pathlib
from types import ModuleType

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"


def load_script(name: str) -> ModuleType:
    """A script, imported: its functions can be called."""
    spec = importlib.util.spec_from_file_location(name, LAUNCH / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
