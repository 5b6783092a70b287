"""A machine that has an accelerator, and a program that computes on its CPU: said aloud, for it costs weeks."""

import logging
import os
from pathlib import Path

import jax

_log = logging.getLogger("offsetjax")
_GOOGLE = "0x1ae0"  # the maker of TPUs, as PCI devices say it


def warn_of_cpu(root: str = "/") -> bool:
    """Warns where jax has fallen back to the CPU beside an accelerator; not where `JAX_PLATFORMS` asks for the CPU.

    Args:
        root: of the file system in which devices are looked for.

    Returns:
        Whether it has.
    """
    if jax.default_backend() != "cpu" or "cpu" in os.environ.get("JAX_PLATFORMS", ""):
        return False
    found = _accelerator(Path(root))
    if found:
        extra = "cuda" if "nvidia" in found else "tpu"
        _log.warning(
            "WARNING: COMPUTING ON THE CPU, THOUGH THIS MACHINE HAS AN ACCELERATOR (%s): install offsetjax[%s] and see "
            "that no other program holds it, or set JAX_PLATFORMS=cpu if the CPU is meant",
            found,
            extra,
        )
    return bool(found)


def _accelerator(root: Path) -> str:
    """The path of a device file or of a PCI device; "" where there is none."""
    for pattern in ("dev/nvidia[0-9]*", "dev/accel[0-9]*", "dev/accel/accel[0-9]*"):
        for device in sorted(root.glob(pattern)):
            return str(device)
    for vendor in sorted(root.glob("sys/bus/pci/devices/*/vendor")):
        if vendor.read_text().strip() == _GOOGLE:
            return str(vendor.parent)
    return ""
