"""Checkpoints: the train state and the data position in one orbax step, saved in the background.

What sampling and export need is a part of one, and is read alone: parameters straight into their shards, or tensor by
tensor (`arrays.py`), never the optimizer's moments. What is read is compared with checksums from when it was written. A
resume takes the newest step that can be read; what cannot be is set aside, and never deleted.
"""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree

from offsetjax.errors import Status, StorageError, TransientError, UserError, kind_of, one_line
from offsetjax.files import room_of, size_text, storage_error
from offsetjax.json_text import parse_object
from offsetjax.parallel.processes import all_of, barrier
from offsetjax.storage import checksums, digests
from offsetjax.storage.retry import retried

_log = logging.getLogger("offsetjax")
STATE, DATA, ASIDE = "state", "data", "unreadable"
Result = TypeVar("Result")


class UnreadableError(UserError):
    """A step that cannot be read, whatever is tried again: damaged, cut short or not whole."""


def open_checkpoints(
    workdir: epath.PathLike, max_to_keep: int | None = None, keep_every_steps: int = 0
) -> ocp.CheckpointManager:
    """The manager of `workdir/checkpoints`; close it, or use it in a `with`, so that the last save ends.

    Args:
        max_to_keep: the newest that are kept; None: all.
        keep_every_steps: multiples of this are kept for ever too; 0: none.
    """
    logging.getLogger("absl").addFilter(_is_not_told_twice)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=max_to_keep, keep_period=keep_every_steps or None, enable_async_checkpointing=True
    )
    handlers = {STATE: _state_handler(), DATA: ocp.JsonCheckpointHandler()}
    workdir = epath.Path(workdir)
    is_local = "://" not in str(workdir)  # `resolve` would make a local path of gs://…
    directory = (workdir.resolve() if is_local else workdir) / "checkpoints"
    return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)


def _is_not_told_twice(record: logging.LogRecord) -> bool:
    """Drops what orbax logs of a save that fails, up to five times its stack trace: who waits for it reports it."""
    return not (record.exc_info and record.levelno >= logging.ERROR and "orbax" in record.pathname)


def _state_handler() -> ocp.PyTreeCheckpointHandler:
    # Hosts share the writing of what they all hold; within one, cutting it up for that would compile a program for each
    # shape and stop the training for half a minute.
    arrays = ocp.type_handlers.ArrayHandler(
        use_replica_parallel=jax.process_count() > 1, min_slice_bytes_for_replica_parallel=2**20
    )
    # Weights hardly shrink, and packing them would make saving, restoring and export several times slower.
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)


def newest_step(workdir: epath.PathLike) -> int:
    """The step of the newest checkpoint, 0 where there is none; nothing is made."""
    if not (epath.Path(workdir) / "checkpoints").exists():
        return 0
    with open_checkpoints(workdir) as manager:
        return manager.latest_step() or 0


def save(manager: ocp.CheckpointManager, step: int, state: PyTree, data: dict[str, Any]) -> None:
    """Saves in the background; the state may be donated at once.

    A save before this one that failed for what may pass is reported, and this one made; the step before is still there.

    Raises:
        StorageError: the place is full, read-only, over its quota or gone.
        TransientError: this save failed too.
    """
    data = digests.signed({**data, "checksums": checksums.of_tree(state)})
    args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), data=ocp.args.JsonSave(data))
    for is_last in (False, True):
        try:
            manager.save(step, args=args, force=True)
            return
        except Exception as error:  # of this save, or of the one before
            failure = _not_saved(manager, error, size_of(state))
            if is_last or not isinstance(failure, TransientError):
                raise failure from error
            _log.warning("%s; trying again", failure)


def wait(manager: ocp.CheckpointManager, state_bytes: int = 0) -> None:
    """Waits for the last save.

    Raises:
        StorageError, TransientError: it failed; the step before is still there.
    """
    try:
        manager.wait_until_finished()
    except Exception as error:
        raise _not_saved(manager, error, state_bytes) from error


def size_of(tree: PyTree) -> int:
    """The bytes of a tree's arrays, abstract or not."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def check_room(workdir: epath.PathLike, state_bytes: int) -> None:
    """Looks, before a training, whether the next checkpoint fits on the disk.

    Raises:
        StorageError: it does not.
    """
    room = room_of(workdir)
    if room is not None and room < state_bytes:
        raise StorageError(
            f"workdir: {workdir}: a checkpoint takes {size_text(state_bytes)}, but {size_text(room)} are free; make "
            "room, then the same command tries again"
        )


def _not_saved(manager: ocp.CheckpointManager, error: Exception, state_bytes: int) -> Exception:
    kind, place = kind_of(error), manager.directory
    is_gone = "://" not in str(place) and not place.parent.exists()
    if is_gone or kind in (
        Status.STORAGE,
        Status.MISTAKE,
    ):  # a path that is none any more is no mistake in the settings
        return storage_error(place, error, state_bytes, "a checkpoint takes")
    if kind == Status.TRANSIENT:
        return TransientError(
            f"checkpoint: {place}: {one_line(error)}; the step before is kept, and the same command resumes from it"
        )
    return error


def restore(manager: ocp.CheckpointManager, like: PyTree, step: int | None = None) -> tuple[PyTree, dict[str, Any]]:
    """The state, placed as `like` (abstract arrays with shardings), and the data position.

    Args:
        step: the step; None is the newest.

    Raises:
        UserError: no such step, or one that cannot be read or has changed since it was written.
        TransientError: it could not be read, which may pass.
    """
    step = existing_step(manager, step)
    data = read_data(manager, step)
    expected = data.pop("checksums")
    state = _read_state(manager, step, like, expected)
    return state, data


def restore_newest(
    manager: ocp.CheckpointManager, like: PyTree, check: Callable[[int, dict[str, Any]], None]
) -> tuple[PyTree, dict[str, Any]]:
    """The newest state that can be read, and its data position; newer ones are set aside, with a warning.

    Args:
        check: is called with a step and its data position before the state is read, and raises where that does not
            fit: an UnreadableError where an older step may.

    Raises:
        UserError: there is none, or what `check` raises.
        TransientError: one could not be read, which may pass.
    """
    steps = sorted(manager.all_steps(), reverse=True)
    existing_step(manager)
    unreadable: dict[int, str] = {}
    for step in steps:
        try:
            data = read_data(manager, step)
            expected = data.pop("checksums")
            check(step, data)
            state = _read_state(manager, step, like, expected)
        except UnreadableError as error:
            unreadable[step] = str(error)
            continue
        for newer, why in unreadable.items():
            aside = _set_aside(manager, newer)
            _log.warning("%s; it is kept as %s, and step %d is resumed", why, aside, step)
        return state, data
    raise UserError("; ".join(unreadable.values()) + "; restore one from a copy, or give another --workdir")


def _set_aside(manager: ocp.CheckpointManager, step: int) -> epath.Path:
    """Moves a step that cannot be read out of the way of the one that will be saved in its place."""
    aside = manager.directory.parent / ASIDE / f"{step}_{time.strftime('%Y%m%d_%H%M%S')}"
    if jax.process_index() == 0:
        aside.parent.mkdir(parents=True, exist_ok=True)
        (manager.directory / str(step)).rename(aside)
    barrier("an unreadable step is set aside")
    manager.reload()
    return aside


def read_data(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """The data position of a step, with the checksums of its arrays.

    Raises:
        UserError: it was written by a version without checksums, or cannot be read.
    """
    file = manager.directory / str(step) / DATA / "metadata"

    def read() -> dict[str, Any]:
        data = parse_object(file.read_bytes())
        if not isinstance(data.get("checksums", {}), dict):
            raise ValueError("its data position has no checksums")
        if "checksums" in data and digests.is_damaged(data):
            raise ValueError("its data position is damaged: its digest is not the one that was written")
        return {key: value for key, value in data.items() if key != digests.KEY}

    data = tried(manager, step, read)
    if "checksums" not in data:
        raise UserError(
            f"checkpoint: {manager.directory} was written by an older version of offsetjax, without checksums; "
            "continue with that version, or give another --workdir"
        )
    return data


def _read_state(
    manager: ocp.CheckpointManager, step: int, like: PyTree, expected: Mapping[str, int], is_part: bool = False
) -> PyTree:
    # By the handler itself: the manager's restore waits for all processes at its end, also for one that has failed.
    args = _restore_args(like, partial_restore=True) if is_part else _restore_args(like)
    state, failure = None, None
    try:
        state = tried(manager, step, lambda: _state_handler().restore(manager.directory / str(step) / STATE, args=args))
    except (UnreadableError, TransientError) as error:
        failure = error
    if isinstance(failure, TransientError):
        raise failure
    if not all_of(failure is None):
        raise failure or UnreadableError(f"checkpoint: {manager.directory / str(step)}: another process cannot read it")
    tried(manager, step, lambda: checksums.check(state, expected))  # the same on all processes
    return state


def restore_part(manager: ocp.CheckpointManager, name: str, like: PyTree, step: int | None = None) -> PyTree:
    """One field of the state, such as `params`, placed as `like`; the rest of the checkpoint is not read.

    Raises:
        UserError: as for `restore`.
    """
    step = existing_step(manager, step)
    expected = read_data(manager, step)["checksums"]
    return _read_state(manager, step, {name: like}, expected, is_part=True)[name]


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


def tried(manager: ocp.CheckpointManager, step: int, read: Callable[[], Result]) -> Result:
    """What a read of a step gives, tried again where its failure may pass.

    Raises:
        UnreadableError: it fails for another reason.
        StorageError, TransientError: see `retry.retried`.
    """
    where = f"checkpoint: {manager.directory / str(step)}"
    try:
        return retried(read, where)
    except (TransientError, StorageError, UnreadableError):
        raise
    except Exception as error:  # orbax raises several kinds, bare exceptions too
        first = next(iter(str(error.__cause__ or error).splitlines()), type(error).__name__)
        raise UnreadableError(f"{where} cannot be read ({first[:160]})") from error


def abstract(tree: PyTree, shardings: PyTree) -> PyTree:
    """Abstract arrays of a tree's shapes and types, with shardings: what `restore` fills."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
