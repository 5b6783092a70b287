"""`offsetjax checkpoint list|verify|prune`: what a work directory has saved."""

from etils import epath

from offsetjax import log
from offsetjax.errors import UserError
from offsetjax.files import size_text
from offsetjax.storage import arrays, checkpoint
from offsetjax.storage.checkpoint import UnreadableError
from offsetjax.storage.lock import WorkdirLock


def list_steps(workdir: epath.PathLike) -> None:
    """Prints each step with its size.

    Raises:
        UserError: there is none.
    """
    with checkpoint.open_checkpoints(_existing(workdir)) as manager:
        checkpoint.existing_step(manager)
        for step in sorted(manager.all_steps()):
            log.show(f"step {step}  {size_text(_size(manager.directory / str(step)))}")


def verify(workdir: epath.PathLike, step: int | None = None) -> None:
    """Reads every array of each step, or of one, and prints whether it is as it was written.

    Raises:
        UserError: one is not.
    """
    unreadable = 0
    with checkpoint.open_checkpoints(_existing(workdir)) as manager:
        checkpoint.existing_step(manager, step)
        for each in sorted(manager.all_steps()) if step is None else [step]:
            try:
                log.show(f"step {each}  good: {arrays.verify(manager, each)} arrays")
            except UnreadableError as error:
                unreadable += 1
                log.show(f"step {each}  {error}")
    if unreadable:
        raise UserError(
            f"checkpoint: {unreadable} steps of {workdir} cannot be read; a resume takes the newest that can"
        )


def prune(workdir: epath.PathLike, keep: int) -> None:
    """Deletes all steps but the newest, once these are known to be good.

    Args:
        keep: the number of steps that stay.

    Raises:
        UserError: one of them cannot be read, or a training is at work there; nothing is deleted then.
    """
    if keep < 1:
        raise UserError(f"checkpoint: --keep={keep} must be at least 1")
    with WorkdirLock(_existing(workdir), lost=lambda why: None) as lock:
        lock.acquire()
        with checkpoint.open_checkpoints(workdir) as manager:
            checkpoint.existing_step(manager)
            steps = sorted(manager.all_steps())
            for step in steps[-keep:]:
                try:
                    arrays.verify(manager, step)
                except UnreadableError as error:
                    raise UserError(
                        f"checkpoint: nothing is deleted, for step {step} cannot be read: {error}"
                    ) from error
            for step in steps[:-keep]:
                lock.check()
                manager.delete(step)
                log.show(f"step {step}  deleted")


def _existing(workdir: epath.PathLike) -> epath.PathLike:
    if not (epath.Path(workdir) / "checkpoints").exists():
        raise UserError(f"workdir: {workdir} has no checkpoint; give the --workdir of a training")
    return workdir


def _size(folder: epath.Path) -> int:
    return sum(_size(path) if path.is_dir() else path.stat().length for path in folder.iterdir())
