"""What a run notes of its steps beside its checkpoints: a run that has lost them must not begin again."""

import json
import logging
import re

import jax
import orbax.checkpoint as ocp
from etils import epath

from offsetjax.errors import UserError, one_line
from offsetjax.files import write_whole
from offsetjax.json_text import parse_object
from offsetjax.storage import digests

_log = logging.getLogger("offsetjax")

_SAVED = "saved.json"  # beside `checkpoints`


def newest_saved(workdir: epath.PathLike) -> int | None:
    """The newest step that was ever saved, as the run has noted; 0 before the first; None where that is not known."""
    file = epath.Path(workdir) / _SAVED
    if not file.exists():
        return None
    try:
        return int(digests.check_json(parse_object(file.read_bytes()), str(file))["step"])
    except (OSError, ValueError, TypeError, KeyError, UserError) as error:
        _log.warning("%s cannot be read (%s): which step was saved last is not known", file, one_line(error))
        return None


def note_saved(manager: ocp.CheckpointManager) -> None:
    """Notes, beside the checkpoints, the newest step that is whole: a run that has lost them must not begin again."""
    workdir = manager.directory.parent
    step = max(_whole_steps(workdir), default=0) if jax.process_index() == 0 else 0
    if step and step > (newest_saved(workdir) or 0):
        _write(workdir, step)


def note_begun(workdir: epath.PathLike) -> None:
    """Notes that a run has no step yet: one whose first save fails may begin again."""
    _write(epath.Path(workdir), 0)


def _write(workdir: epath.Path, step: int) -> None:
    write_whole(workdir / _SAVED, json.dumps(digests.signed({"step": step})) + "\n")


def has_saved(workdir: epath.PathLike) -> bool:
    """Whether a run has, or may have, saved a step there."""
    workdir = epath.Path(workdir)
    return bool(_whole_steps(workdir)) or ((workdir / _SAVED).exists() and newest_saved(workdir) != 0)


def _whole_steps(workdir: epath.Path) -> list[int]:
    """On a disk a step gets its name once it is whole, on a bucket a file that says so."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return [int(name) for name in names if name.isdecimal() and _is_whole(folder / name)]


def steps_made(workdir: epath.PathLike) -> int:
    """The last step that a run's log has; 0 where it has none."""
    try:
        text = (epath.Path(workdir) / "metrics.jsonl").read_bytes()
    except OSError:
        return 0
    return max((int(found[1]) for found in re.finditer(rb'"step": (\d{1,12})\b', text)), default=0)


def _is_whole(step: epath.Path) -> bool:
    return "://" not in str(step) or (step / "commit_success.txt").exists()
