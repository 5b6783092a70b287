"""One training a work directory: a lock, on a disk or on a bucket.

`lock.json` names who holds it (host, process, since when), by a token of its own, with a number that the holder raises
every few seconds. Whoever comes and finds it waits for that number: where it rises, the holder is alive, and the
newcomer is refused; where it stands still, or where the process is known to have ended, the lock is taken over.
No clocks are compared. A holder that wakes up, after it was stopped for so long, finds the token of its successor and
ends before it writes anything: it looks before each checkpoint too.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from etils import epath

from offsetjax.errors import StorageError, UserError
from offsetjax.files import write_whole
from offsetjax.json_text import parse_object

_log = logging.getLogger("offsetjax")

BEAT_SECONDS, STALE_SECONDS = 5.0, 30.0
_SETTLE_SECONDS = 1.0  # of two that take a lock at the same moment, the last to write has it


@dataclass(frozen=True)
class Holder:
    """Who holds a lock."""

    token: str
    host: str
    process: int
    machine: str  # where the process's number means something: until the next boot, in one container
    started: str  # of the process, as the system counts
    since: str
    beat: int = 0

    def describe(self) -> str:
        return f"process {self.process} on {self.host}, since {self.since}"


class WorkdirLock:
    """The lock of a work directory; inside its context it may be acquired, and is released at the end.

    Args:
        lost: called, in a thread, once another has taken it over, with a line that says so.
    """

    def __init__(self, workdir: epath.PathLike, lost: Callable[[str], Any]) -> None:
        self._file, self._lost = epath.Path(workdir) / "lock.json", lost
        self._mine: Holder | None = None
        self._writing, self._released = threading.Lock(), threading.Event()

    def __enter__(self) -> "WorkdirLock":
        return self

    def __exit__(self, *_: Any) -> None:
        self._released.set()
        with self._writing:
            if self._mine is not None and _is(_read(self._file), self._mine):
                with contextlib.suppress(OSError):
                    self._file.unlink()
            self._mine = None

    def acquire(self) -> None:
        """Takes the lock, after it was waited for whether another's holder is alive.

        Raises:
            UserError: it is.
        """
        if self._mine is not None:
            return
        if (other := _read(self._file)) is not None:
            self._wait_for(other)
        mine = _this_process()
        self._write(mine)
        if "://" in os.fspath(self._file) or other is not None:
            time.sleep(_SETTLE_SECONDS)
        if (found := _read(self._file)) is not None and not _is(found, mine):
            raise _held(self._file, found)
        self._mine = mine
        threading.Thread(target=self._beat, daemon=True, name="offsetjax lock").start()

    def check(self) -> None:
        """To be called before something is written that another's must not follow.

        Raises:
            UserError: another has taken the lock over.
        """
        if self._mine is not None and (found := _read(self._file)) is not None and not _is(found, self._mine):
            raise UserError(self._taken(found))

    def _wait_for(self, other: Holder) -> None:
        if _has_ended(other):
            return
        end = time.monotonic() + STALE_SECONDS
        while time.monotonic() < end:
            time.sleep(min(0.5, BEAT_SECONDS))
            found = _read(self._file)
            if found is None or _has_ended(found):
                return
            if found != other:
                raise _held(self._file, found)
        _log.warning("%s: its holder, %s, has shown no life for %g s", self._file, other.describe(), STALE_SECONDS)

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            with self._writing:
                if self._mine is None:
                    return
                found = _read(self._file)
                if found is not None and not _is(found, self._mine):
                    break
                self._mine = replace(self._mine, beat=self._mine.beat + 1)
                with contextlib.suppress(OSError, StorageError):  # full, or away: what needs it says so
                    if self._file.parent.exists():  # or a run that was deleted would be there again
                        self._write(self._mine)
        else:
            return
        self._lost(self._taken(found))

    def _taken(self, by: Holder) -> str:
        return f"workdir: {self._file.parent} was taken over by {by.describe()}, as this process had shown no life"

    def _write(self, holder: Holder) -> None:
        write_whole(self._file, json.dumps(asdict(holder)) + "\n")


def _is(found: Holder | None, mine: Holder) -> bool:
    return found is not None and found.token == mine.token


def _held(file: epath.Path, by: Holder) -> UserError:
    return UserError(
        f"workdir: {file.parent} is in use by another training ({by.describe()}); wait for its end, or give another "
        "--workdir"
    )


def _read(file: epath.Path) -> Holder | None:
    """Who holds it; None where there is no lock, or none that says so."""
    try:
        return Holder(**parse_object(file.read_bytes()))
    except (OSError, ValueError, TypeError):  # on its way, or damaged: whoever holds it writes it again
        return None


def _this_process() -> Holder:
    host, number = socket.gethostname(), os.getpid()
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return Holder(uuid.uuid4().hex, host, number, _machine(), _started(number), since)


def _machine() -> str:
    with contextlib.suppress(OSError):
        boot = epath.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return ""


def _started(process: int) -> str:
    with contextlib.suppress(OSError, IndexError):
        fields = epath.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]  # a zombie has ended
    return ""


def _has_ended(holder: Holder) -> bool:
    """Whether this machine knows that the process is none any more."""
    return bool(holder.machine) and holder.machine == _machine() and _started(holder.process) != holder.started
