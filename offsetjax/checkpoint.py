"""Checkpoints: the train state and the data position in one orbax step, saved in the background."""

from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree

from offsetjax.errors import UserError


def open_checkpoints(workdir: epath.PathLike, max_to_keep: int | None = None) -> ocp.CheckpointManager:
    """The manager of `workdir/checkpoints`; close it, or use it in a `with`, so that the last save ends."""
    options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, enable_async_checkpointing=True)
    return ocp.CheckpointManager(epath.Path(workdir).resolve() / "checkpoints", options=options)


def save(manager: ocp.CheckpointManager, step: int, state: PyTree, data: dict[str, Any]) -> None:
    """Saves in the background; the state may be donated at once."""
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data))
    manager.save(step, args=args, force=True)


def restore(manager: ocp.CheckpointManager, like: PyTree, step: int | None = None) -> tuple[PyTree, dict[str, Any]]:
    """The state, placed as `like` (abstract arrays with shardings), and the data position.

    Args:
        step: the step; None is the newest.

    Raises:
        UserError: no such step, or one that cannot be read.
    """
    found = sorted(manager.all_steps())
    step = step if step is not None else (found[-1] if found else None)
    where = manager.directory
    if step not in found:
        steps = ", ".join(map(str, found)) or "none"
        raise UserError(f"checkpoint: {where} has no step {step} (it has {steps}); give --step one of these")
    args = ocp.args.Composite(state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore())
    try:
        restored = manager.restore(step, args=args)
    except (ValueError, OSError, KeyError, TypeError, FileNotFoundError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"checkpoint: {where / str(step)} cannot be read ({first[:160]}); move it away to use an older step"
        ) from error
    return restored["state"], restored["data"]


def abstract(tree: PyTree, shardings: PyTree) -> PyTree:
    """Abstract arrays of a tree's shapes and types, with shardings: what `restore` fills."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
