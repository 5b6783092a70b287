"""The mesh and the rules that place every array on it.

Axes: `data` replicates parameters, `fsdp` shards them; a batch is split over both. A parameter, its optimizer moments
and its average are placed by the first rule whose pattern is found in its path.
"""

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree
from ml_collections import ConfigDict

from offsetjax.errors import UserError

# Pattern of the path → which dimension is split over fsdp: None for none of them, otherwise the largest that divides.
RULES: tuple[tuple[str, str | None], ...] = (
    (r"/(bias|scale)$", None),
    (r"/(kernel|embedding)$", "largest"),
    (r".*", None),
)
BATCH = P(("data", "fsdp"))


def make_mesh(config: ConfigDict) -> Mesh:
    """The mesh of `config.mesh`, over all devices.

    Raises:
        UserError: the axes do not multiply to the number of devices.
    """
    shape = {"data": config.mesh.data, "fsdp": config.mesh.fsdp}
    devices = jax.device_count()
    known = int(np.prod([size for size in shape.values() if size != -1]))
    if devices % known or (-1 not in shape.values() and known != devices):
        raise UserError(f"config: mesh {shape} does not fit {devices} devices; mesh.data = -1 uses all that are left")
    shape = {axis: devices // known if size == -1 else size for axis, size in shape.items()}
    if config.train.global_batch_size // config.train.accumulate_steps % devices:
        raise UserError(
            f"config: train.global_batch_size / train.accumulate_steps = "
            f"{config.train.global_batch_size // config.train.accumulate_steps} must be a multiple of the "
            f"{devices} devices"
        )
    return mesh_of(**shape)


def mesh_of(*, data: int, fsdp: int) -> Mesh:
    """A mesh of `data x fsdp` devices."""
    # Explicit axes, the default, refuse a vmap over a sharded batch.
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def spec(path: str, shape: tuple[int, ...], fsdp: int) -> P:
    """Where the array of this path and shape lies, on a mesh with `fsdp` shards."""
    rule = next(split for pattern, split in RULES if re.search(pattern, path))
    divisible = [axis for axis, size in enumerate(shape) if size % fsdp == 0 and size >= fsdp]
    if rule is None or fsdp == 1 or not divisible:
        return P()
    axis = max(divisible, key=lambda axis: shape[axis])
    return P(*("fsdp" if i == axis else None for i in range(len(shape))))


def path_name(path: tuple[Any, ...]) -> str:
    """`opt_state/0/mu/conv_in/kernel`: a tree path as text."""
    return "/" + jax.tree_util.keystr(path, simple=True, separator="/")


def shardings(mesh: Mesh, tree: PyTree) -> PyTree:
    """A `NamedSharding` for each array (or abstract array) of a tree, by `RULES`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec(path_name(path), leaf.shape, mesh.shape["fsdp"])), tree
    )
