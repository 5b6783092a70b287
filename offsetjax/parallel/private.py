"""What JAX keeps to itself and nothing public says: the one file that reads it, tried with the versions of `TRIED`."""

from typing import Any

from jax._src import cloud_tpu_init
from jax._src.distributed import global_state

TRIED = ("0.10.2",)  # of jax; a test names the attributes


def is_cloud_tpu_vm() -> bool:
    """Whether JAX would look for the other hosts of a slice by itself."""
    return cloud_tpu_init.running_in_cloud_tpu_vm


def distributed() -> Any:
    """The client and the service of the coordination service, this process's number and how many there are."""
    return global_state
