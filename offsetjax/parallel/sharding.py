"""The mesh and the rules that place every array on it.

Axes of the mesh:

- `data` replicates parameters; it alone reaches from slice to slice;
- `fsdp` splits parameters, to be gathered where they are used (`fsdp.py`); a batch is split over `data` and `fsdp`;
- `tensor` splits the heads of attention and the width of feed-forward layers, and stays split where they are used
  (Megatron, arXiv 1909.08053), but that GEGLU's two halves, which lie in one kernel, are exchanged.

A parameter, its optimizer moments and its average are placed by the first rule whose pattern is found in its path: of
the rules of its model's networks, which declare them (`Pipeline.sharding`), and then of `WEIGHTS`.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree
from ml_collections import ConfigDict

from offsetjax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))


class Rule(NamedTuple):
    """How the arrays whose path has `pattern` are split.

    Attributes:
        tensor_axis: the array's axis that is split over `tensor`, where it divides.
        is_split: whether the largest other axis that divides is split over `fsdp`.
    """

    pattern: str
    tensor_axis: int | None
    is_split: bool


# Of every network, after its own rules.
WEIGHTS = (Rule(r"/(kernel|embedding)$", None, True), Rule(r".*", None, False))


def split_layers(columns: str, rows: str) -> tuple[Rule, ...]:
    """The rules of a network whose heads and hidden units are split over `tensor` (Megatron).

    Args:
        columns: the dense layers, as alternatives of a regular expression, whose outputs are split: of queries, keys
            and values, and into the hidden units.
        rows: those that take what the columns give.
    """
    return Rule(rf"/({columns})/kernel$", 1, True), Rule(rf"/({rows})/kernel$", 0, True)


def make_mesh(axes: ConfigDict, train: ConfigDict, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of the section `mesh` of a config, over all devices of this machine or those given.

    Args:
        train: the section that says how large a batch is.

    Raises:
        UserError: the axes do not multiply to the number of devices, or the batch or the slices do not divide.
    """
    devices = jax.devices() if devices is None else devices
    shape = {axis: axes[axis] for axis in AXES}
    known = int(np.prod([size for size in shape.values() if size != -1]))
    if len(devices) % known or (-1 not in shape.values() and known != len(devices)):
        raise UserError(
            f"config: mesh {shape} does not fit {len(devices)} devices; mesh.data = -1 uses all that are left"
        )
    shape = {axis: len(devices) // known if size == -1 else size for axis, size in shape.items()}
    slices = len({_slice(device) for device in devices})
    if shape["data"] % slices:
        raise UserError(
            f"config: mesh.data = {shape['data']} must be a multiple of the {slices} slices: parameters are split "
            f"within a slice, and replicated over the slices; set mesh.data = {slices}, with mesh.fsdp = -1"
        )
    parts, batch = shape["data"] * shape["fsdp"], train.global_batch_size // train.accumulate_steps
    if batch % parts:
        split_over = f"{len(devices)} devices" if parts == len(devices) else f"mesh.data x mesh.fsdp = {parts}"
        raise UserError(
            f"config: train.global_batch_size / train.accumulate_steps = {batch} must be a multiple of the "
            f"{split_over}; the next one is {-(-batch // parts) * parts}"
        )
    return mesh_of(**shape, devices=devices)


def mesh_of(*, data: int, fsdp: int, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the first `data x fsdp x tensor` devices: neighbours along `tensor`, slices along `data`."""
    devices = jax.devices()[: data * fsdp * tensor] if devices is None else devices
    slices = [list(group) for _, group in itertools.groupby(sorted(devices, key=_slice), _slice)]
    grid = np.concatenate([_grid((data // len(slices), fsdp, tensor), each) for each in slices])
    # Explicit axes, the default, refuse a vmap over a sharded batch.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def rings(mesh: Mesh) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """The axes of a TPU's torus that the `fsdp` axis runs along, the slowest first: each as groups of its indices.

    Devices of a group lie on one line of the torus. A mesh whose devices have no coordinates, or whose `fsdp` axis
    fills no box of the torus, has one group of all.
    """
    count = mesh.shape["fsdp"]
    whole = ((tuple(range(count)),),)
    devices = mesh.devices[0, :, 0]
    if not all(hasattr(device, "coords") for device in devices):
        return whole
    places = np.array([device.coords for device in devices])
    extents = np.array([len(set(column)) for column in places.T])
    if np.prod(extents) != count:
        return whole
    strides = {int(np.argmax(places[:, axis] != places[0, axis])): axis for axis in np.flatnonzero(extents > 1)}
    order = [strides[stride] for stride in sorted(strides, reverse=True)]
    index = np.arange(count).reshape([extents[axis] for axis in order])
    lines = [np.moveaxis(index, place, -1).reshape(-1, extents[axis]) for place, axis in enumerate(order)]
    for axis, each in zip(order, lines, strict=True):
        if any(np.ptp(np.delete(places[line], axis, 1), axis=0).any() for line in each):
            return whole
    return tuple(tuple(tuple(int(i) for i in line) for line in each) for each in lines)


def _grid(shape: tuple[int, int, int], devices: Sequence[Any]) -> np.ndarray:
    """The devices of one slice, such that `fsdp` and `tensor` run along axes of the torus where they can."""
    places = np.array([getattr(device, "coords", ()) for device in devices])
    # What the last axes of the torus hold, the last first.
    boxes = np.cumprod((np.ptp(places, axis=0) + 1)[::-1]).tolist() if places.size else []
    if len(devices) in boxes and {shape[2], shape[1] * shape[2]} <= {1, *boxes}:
        return np.asarray(sorted(devices, key=lambda device: tuple(device.coords))).reshape(shape)
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except TypeError:  # jax's way to say that it found no assignment, as of 64 to a torus of 16x20x28
        return np.asarray(devices).reshape(shape)


def _slice(device: Any) -> int:
    return getattr(device, "slice_index", 0)


def spec(path: str, shape: tuple[int, ...], mesh_shape: Mapping[str, int], rules: Sequence[Rule]) -> P:
    """Where the array of this path and shape lies, on a mesh with `mesh_shape` devices an axis."""
    rule = _rule(path, rules)
    split: list[str | None] = [None] * len(shape)

    def divides(axis: int, over: str) -> bool:
        return split[axis] is None and mesh_shape[over] > 1 and shape[axis] % mesh_shape[over] == 0 and shape[axis] > 0

    if rule.tensor_axis is not None and len(shape) == 2 and divides(rule.tensor_axis, "tensor"):
        split[rule.tensor_axis] = "tensor"
    divisible = [axis for axis in range(len(shape)) if divides(axis, "fsdp")]
    if rule.is_split and divisible:
        split[max(divisible, key=lambda axis: shape[axis])] = "fsdp"
    return P(*split) if any(split) else P()


def _rule(path: str, rules: Sequence[Rule]) -> Rule:
    return next(rule for rule in (*rules, *WEIGHTS) if re.search(rule.pattern, path))


def path_name(path: tuple[Any, ...]) -> str:
    """`opt_state/0/mu/conv_in/kernel`: a tree path as text."""
    return "/" + jax.tree_util.keystr(path, simple=True, separator="/")


def specs(mesh: Mesh, rules: Sequence[Rule], tree: PyTree) -> PyTree:
    """A `PartitionSpec` for each array (or abstract array) of a tree, by the rules of its networks."""

    def of_leaf(path: tuple[Any, ...], leaf: Any) -> P:
        return spec(path_name(path), leaf.shape, mesh.shape, rules)

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def shardings(mesh: Mesh, rules: Sequence[Rule], tree: PyTree) -> PyTree:
    """A `NamedSharding` for each array (or abstract array) of a tree, by the rules of its networks."""
    return jax.tree.map(lambda where: NamedSharding(mesh, where), specs(mesh, rules, tree))


def rows_of_process(sharding: NamedSharding, count: int, process: int | None = None) -> tuple[int, ...]:
    """The rows of a batch of `count` that a process's devices hold, in order; those of this process by default.

    They need not lie together, for a mesh follows the torus and not the hosts; and where `tensor` reaches over hosts,
    several processes hold the same ones.
    """
    process = jax.process_index() if process is None else process
    parts: Mapping[Any, Any] = sharding.devices_indices_map((count,))
    mine = [part.indices(count) for device, (part,) in parts.items() if device.process_index == process]
    return tuple(sorted({row for bounds in mine for row in range(*bounds)}))


class Placed(NamedTuple):
    """What one rule places: the number of arrays, their elements, and how many of those a device holds."""

    pattern: str
    arrays: int
    elements: int
    elements_per_device: int
    undivided: tuple[str, ...]  # large arrays that the rule would split, and no axis of which divides


def placed(mesh: Mesh, rules: Sequence[Rule], tree: PyTree) -> tuple[Placed, ...]:
    """What each rule places of a tree, in the rules' order; rules that place nothing are left out."""
    rows = []
    leaves = [(path_name(path), leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    for rule in (*rules, *WEIGHTS):
        mine = [(path, shape) for path, shape in leaves if _rule(path, rules) is rule]
        if not mine:
            continue
        local = {
            path: NamedSharding(mesh, spec(path, shape, mesh.shape, rules)).shard_shape(shape) for path, shape in mine
        }
        undivided = tuple(
            path for path, shape in mine if rule.is_split and local[path] == shape and np.prod(shape) >= _LARGE
        )
        rows.append(
            Placed(
                rule.pattern,
                len(mine),
                sum(int(np.prod(shape)) for _, shape in mine),
                sum(int(np.prod(shape)) for shape in local.values()),
                undivided if mesh.shape["fsdp"] > 1 else (),
            )
        )
    return tuple(rows)


_LARGE = 2**16  # elements; below, an array that is whole on every device costs nothing that could be seen
