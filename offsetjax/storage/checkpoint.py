"""Checkpoints: the train state and the data position in one orbax step, saved in the background.

What sampling and export need is a part of one, and is read alone: parameters straight into their shards, or tensor by
tensor, never the optimizer's moments. What is read is compared with checksums from when it was written.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from jaxtyping import PyTree

from offsetjax.errors import UserError
from offsetjax.formats.tensors import Tensor
from offsetjax.storage import checksums

STATE = "state"
Result = TypeVar("Result")


def open_checkpoints(workdir: epath.PathLike, max_to_keep: int | None = None) -> ocp.CheckpointManager:
    """The manager of `workdir/checkpoints`; close it, or use it in a `with`, so that the last save ends."""
    options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, enable_async_checkpointing=True)
    # Hosts share the writing of what they all hold; within one, cutting it up for that would compile a program for each
    # shape and stop the training for half a minute.
    arrays = ocp.type_handlers.ArrayHandler(
        use_replica_parallel=jax.process_count() > 1, min_slice_bytes_for_replica_parallel=2**20
    )
    handlers = {
        # Weights hardly shrink, and packing them would make saving, restoring and export several times slower.
        STATE: ocp.PyTreeCheckpointHandler(
            use_compression=False,
            type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, arrays)),
        ),
        "data": ocp.JsonCheckpointHandler(),
    }
    workdir = epath.Path(workdir)
    is_local = "://" not in str(workdir)  # `resolve` would make a local path of gs://…
    directory = (workdir.resolve() if is_local else workdir) / "checkpoints"
    return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)


def newest_step(workdir: epath.PathLike) -> int:
    """The step of the newest checkpoint, 0 where there is none; nothing is made."""
    if not (epath.Path(workdir) / "checkpoints").exists():
        return 0
    with open_checkpoints(workdir) as manager:
        return manager.latest_step() or 0


def save(manager: ocp.CheckpointManager, step: int, state: PyTree, data: dict[str, Any]) -> None:
    """Saves in the background; the state may be donated at once."""
    data = {**data, "checksums": checksums.of_tree(state)}
    args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), data=ocp.args.JsonSave(data))
    manager.save(step, args=args, force=True)


def restore(manager: ocp.CheckpointManager, like: PyTree, step: int | None = None) -> tuple[PyTree, dict[str, Any]]:
    """The state, placed as `like` (abstract arrays with shardings), and the data position.

    Args:
        step: the step; None is the newest.

    Raises:
        UserError: no such step, or one that cannot be read or has changed since it was written.
    """
    step = existing_step(manager, step)
    args = ocp.args.Composite(state=_restore_args(like), data=ocp.args.JsonRestore())

    def read() -> tuple[PyTree, dict[str, Any]]:
        restored = manager.restore(step, args=args)
        data = dict(restored["data"])
        checksums.check(restored[STATE], _checksums(data, manager))
        del data["checksums"]
        return restored[STATE], data

    return _read(manager, step, read)


def restore_part(manager: ocp.CheckpointManager, name: str, like: PyTree, step: int | None = None) -> PyTree:
    """One field of the state, such as `params`, placed as `like`; the rest of the checkpoint is not read.

    Raises:
        UserError: as for `restore`.
    """
    step = existing_step(manager, step)
    args = ocp.args.Composite(state=_restore_args({name: like}, partial_restore=True), data=ocp.args.JsonRestore())

    def read() -> PyTree:
        restored = manager.restore(step, args=args)
        checksums.check(restored[STATE], _checksums(restored["data"], manager))
        return restored[STATE][name]

    return _read(manager, step, read)


def open_part(manager: ocp.CheckpointManager, name: str, like: PyTree, step: int | None = None) -> PyTree:
    """One field of the state as tensors that are not read yet, in the structure of `like` (abstract arrays).

    Raises:
        UserError: no such step; and when one is read, that it cannot be, or has changed since it was written.
    """
    step = existing_step(manager, step)
    folder = manager.directory / str(step) / STATE

    def describe() -> tuple[bool, dict[str, int]]:
        args = ocp.args.Composite(data=ocp.args.JsonRestore())
        metadata = json.loads((folder / "_METADATA").read_text())
        return metadata.get("use_zarr3", False), _checksums(manager.restore(step, args=args)["data"], manager)

    # Orbax's form on disk: zarr arrays in an OCDBT database, which its own library reads by ranges.
    is_zarr3, expected = _read(manager, step, describe)
    base = f"{folder}/" if "://" in str(folder) else f"file://{folder}/"
    context = tensorstore.Context()  # the database's index is read once

    def open_array(path: tuple[Any, ...], like: jax.ShapeDtypeStruct) -> Tensor:
        keys = [name, *(str(each.key) for each in path)]
        kvstore = {"driver": "ocdbt", "base": base, "path": ".".join(keys) + "/"}
        spec = {"driver": "zarr3" if is_zarr3 else "zarr", "kvstore": kvstore}

        def read(index: tuple[Any, ...]) -> np.ndarray:
            def fetch() -> np.ndarray:
                stored = tensorstore.open(spec, open=True, read=True, context=context).result()
                if stored.shape != like.shape:
                    raise ValueError(f"{'/'.join(keys)} has shape {stored.shape}, not {like.shape}")
                array = stored[(*index, ...)].read().result()
                if array.shape == like.shape:
                    checksums.check_array(array, expected["/".join(keys)], "/".join(keys))
                return array

            return _read(manager, step, fetch)

        return Tensor(tuple(like.shape), np.dtype(like.dtype), read)

    return jax.tree_util.tree_map_with_path(open_array, like)


def existing_step(manager: ocp.CheckpointManager, step: int | None = None) -> int:
    """The step, or the newest for None.

    Raises:
        UserError: there is none.
    """
    found = sorted(manager.all_steps())
    if not found:
        raise UserError(f"checkpoint: {manager.directory} has no checkpoint yet; wait for the first of its training")
    if step is not None and step not in found:
        steps = ", ".join(map(str, found))
        raise UserError(
            f"checkpoint: {manager.directory} has no step {step} (it has {steps}); give --step one of these"
        )
    return found[-1] if step is None else step


def _restore_args(like: PyTree, **options: Any) -> ocp.args.PyTreeRestore:
    return ocp.args.PyTreeRestore(like, restore_args=ocp.checkpoint_utils.construct_restore_args(like), **options)


def _checksums(data: Mapping[str, Any], manager: ocp.CheckpointManager) -> dict[str, int]:
    if "checksums" not in data:
        raise UserError(
            f"checkpoint: {manager.directory} was written by an older version of offsetjax, without checksums; go on "
            "with that version, or give another --workdir"
        )
    return data["checksums"]


def _read(manager: ocp.CheckpointManager, step: int, read: Callable[[], Result]) -> Result:
    try:
        return read()
    except UserError:
        raise
    except Exception as error:  # orbax raises several kinds, bare exceptions too
        first = next(iter(str(error.__cause__ or error).splitlines()), type(error).__name__)
        raise UserError(
            f"checkpoint: {manager.directory / str(step)} cannot be read ({first[:160]}); move it away to use an older "
            "step"
        ) from error


def abstract(tree: PyTree, shardings: PyTree) -> PyTree:
    """Abstract arrays of a tree's shapes and types, with shardings: what `restore` fills."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
