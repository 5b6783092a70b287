"""What is kept of a fault of the program's own: a file with all that a report of it needs."""

import contextlib
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from importlib import metadata

from offsetjax import log

_LIBRARIES = (
    *("offsetjax", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore", "numpy"),
    *("diffusers", "tokenizers", "safetensors", "tensorflow-datasets", "Pillow"),
)
_VARIABLES = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "OFFSETJAX_", "CUDA_VISIBLE")  # no secret has such a name


def trace(error: BaseException) -> str:
    """An exception's stack trace, and those of the exceptions it came from, as a terminal may show them."""
    return log.printable("".join(traceback.format_exception(error)), keeps_lines=True)


def write_report(error: BaseException, arguments: Sequence[str], folder: str = "") -> str:
    """Writes a file about an exception; returns its path, "" where none could be written.

    Args:
        arguments: of the command line.
        folder: of the run, in which the file lies where that can be; else it lies in the temporary folder.
    """
    text = "\n".join(
        [
            f"offsetjax {' '.join(arguments)}",
            f"{time.strftime('%Y-%m-%d %H:%M:%S %z')}, process {log.process_index()}, {platform.platform()}",
            ", ".join(f"{name} {version}" for name, version in versions().items()),
            f"devices: {_devices()}",
            *(f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)),
            "\nthe stack trace:\n" + trace(error),
            "the last lines of the log:\n" + "\n".join(log.last_lines),
            "\nthe config:\n" + _config(folder),
        ]
    )
    name = f"fault_{time.strftime('%Y%m%d_%H%M%S')}_{log.process_index()}_{os.getpid()}.txt"
    for place in (folder, tempfile.gettempdir()):
        if not place:
            continue
        with contextlib.suppress(Exception):  # the fault itself is what the user has to hear of
            from etils import epath

            path = epath.Path(place) / name
            if path.parent.exists():
                path.write_text(text)
                return str(path)
    return ""


def versions() -> dict[str, str]:
    """The versions of Python, of this package and of the libraries that are installed, by name."""
    found = {"python": platform.python_version()}
    for library in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[library] = metadata.version(library)
    return found


def _devices() -> str:
    if "jax" not in sys.modules:
        return "none used yet"
    with contextlib.suppress(Exception):
        import jax

        devices = jax.devices()
        return f"{len(devices)} x {devices[0].device_kind}, of {jax.process_count()} processes"
    return "not to be had"


def _config(folder: str) -> str:
    with contextlib.suppress(Exception):
        from etils import epath

        return (epath.Path(folder) / "config.json").read_text() if folder else "none"
    return "none yet"
