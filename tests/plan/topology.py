"""Programs compiled for TPUs that are not there, in this process."""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from offsetjax.plan import hlo


def mesh(topology: str, shape: tuple[int, ...], axes: tuple[str, ...], **options: Any) -> Mesh:
    """A mesh of a TPU topology's devices, in their order."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several tests at once
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    return Mesh(np.array(devices).reshape(shape), axes)


def compiled(
    function: Callable[..., Any], mesh: Mesh, specs: tuple[P, ...], out: P, *arguments: jax.ShapeDtypeStruct
) -> hlo.Module:
    """What the compiler made of a function on a mesh."""
    placed = jax.jit(
        function,
        in_shardings=tuple(NamedSharding(mesh, spec) for spec in specs),
        out_shardings=NamedSharding(mesh, out),
    )
    return hlo.parse(placed.lower(*arguments).compile().as_text())
