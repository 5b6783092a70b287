"""What a command that was killed has left half written: found by the next of its kind, and removed.

What is half written has the name of its machine and process in its own: what another process is still at work on stays.
"""

import logging
import os
import re
import shutil
import socket
import tempfile
from pathlib import Path

from etils import epath

_log = logging.getLogger("offsetjax")


def temporary_prefix(what: str) -> str:
    """How a temporary folder's name begins; those of processes that are none any more are removed."""
    for left in Path(tempfile.gettempdir()).glob(f"offsetjax_{what}_*_*"):
        if not _is_running(left.name.removeprefix(f"offsetjax_{what}_").split("_")[0]):
            shutil.rmtree(left, ignore_errors=True)
    return f"offsetjax_{what}_{os.getpid()}_"


def unfinished_name(out: epath.Path) -> epath.Path:
    """The hidden place beside `out` at which it is written; what killed processes of this machine left is removed."""
    host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())
    found = re.compile(rf"\.{re.escape(out.name)}\.(.*)-(\d+)\.unfinished.*", re.DOTALL)
    for left in list(out.parent.iterdir()) if out.parent.exists() else []:
        if not (match := found.fullmatch(left.name)) or _is_running(match[2]):
            continue
        if match[1] != host:
            _log.warning("%s is half written, by a process on %s", left, match[1])
            continue
        (left.rmtree if left.is_dir() else left.unlink)()
        _log.info("%s was half written, by a process that has ended: removed", left)
    return out.parent / f".{out.name}.{host}-{os.getpid()}.unfinished{out.suffix}"


def _is_running(process: str) -> bool:
    """Whether a process of this machine has that number; what is no number is nobody's to remove."""
    if not process.isdecimal():
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
