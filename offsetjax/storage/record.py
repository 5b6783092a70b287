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


def newest_saved(workdir: epath.PathLike) -> int:
    """The newest step that was ever saved, as the run has noted; 0 where it has not."""
    file = epath.Path(workdir) / _SAVED
    if not file.exists():
        return 0
    try:
        return int(digests.check_json(parse_object(file.read_bytes()), str(file))["step"])
    except (OSError, ValueError, TypeError, KeyError, UserError) as error:
        _log.warning("%s cannot be read (%s): which step was saved last is not known", file, one_line(error))
        return 0


def note_saved(manager: ocp.CheckpointManager) -> None:
    """Notes, beside the checkpoints, the newest step that is whole: a run that has lost them must not begin again."""
    if jax.process_index() == 0:
        workdir = manager.directory.parent
        # On a disk a step gets its name once it is whole, on a bucket a file that says so.
        names = [path.name for path in manager.directory.iterdir()] if manager.directory.exists() else []
        whole = [int(name) for name in names if name.isdecimal() and _is_whole(manager.directory / name)]
        if (step := max(whole, default=0)) > newest_saved(workdir):
            write_whole(workdir / _SAVED, json.dumps(digests.signed({"step": step})) + "\n")


def has_saved(workdir: epath.PathLike) -> bool:
    """Whether a run has ever saved a step there, even where the note of which cannot be read."""
    return any((epath.Path(workdir) / name).exists() for name in ("checkpoints", _SAVED))


def steps_made(workdir: epath.PathLike) -> int:
    """The last step that a run's log has; 0 where it has none."""
    try:
        text = (epath.Path(workdir) / "metrics.jsonl").read_bytes()
    except OSError:
        return 0
    return max((int(found[1]) for found in re.finditer(rb'"step": (\d{1,12})\b', text)), default=0)


def _is_whole(step: epath.Path) -> bool:
    return "://" not in str(step) or (step / "commit_success.txt").exists()
