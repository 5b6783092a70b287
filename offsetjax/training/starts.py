"""`starts.jsonl` in a work directory: a line for each start of the run, with what it was started with.

The file is read by people, and by nothing of ours: versions, devices, the config file's text and the overrides, which
show afterwards where two runs differ that should not.
"""

import contextlib
import json
import time
from typing import Any

import jax
from etils import epath

from offsetjax.config import Origin
from offsetjax.faults import versions


def write_start(workdir: epath.PathLike, step: int, devices: str, origin: Origin | None) -> None:
    """Adds a line; a place that cannot be written to is no reason to end a training.

    Args:
        step: that the run resumes after.
        devices: in words.
    """
    if jax.process_index() != 0:
        return
    line: dict[str, Any] = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "step": step, "devices": devices}
    line["versions"] = versions()
    if origin:
        line |= {"config_file": origin.path, "config_text": origin.text(), "overrides": dict(origin.overrides)}
    file = epath.Path(workdir) / "starts.jsonl"
    with contextlib.suppress(OSError, UnicodeError):
        before = file.read_text() if file.exists() else ""
        file.write_text(before + json.dumps(line) + "\n")
