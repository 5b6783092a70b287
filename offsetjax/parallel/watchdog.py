"""A training that hangs is ended, with what every thread was doing: the scheduler can start it again."""

import contextlib
import math
import threading
import time
from typing import Any

from offsetjax.errors import Status
from offsetjax.parallel import processes
from offsetjax.progress import heard_by


class Watchdog:
    """Inside its context all processes end with status 75 once there was no progress for `seconds`; 0: never.

    What counts its items with `progress.tracked` is heard.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds or math.inf
        self._progressed_at, self._closed = time.monotonic(), threading.Event()
        self._hears = contextlib.ExitStack()

    def __enter__(self) -> "Watchdog":
        self._hears.enter_context(heard_by(self.progressed))
        if self._seconds < math.inf:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._closed.set()
        self._hears.close()

    def progressed(self) -> None:
        """To be called after each step, and after each other thing that takes its time."""
        self._progressed_at = time.monotonic()

    def _watch(self) -> None:
        while (left := self._progressed_at + self._seconds - time.monotonic()) > 0:
            if self._closed.wait(left):
                return
        why = f"error: stalled: no progress for {self._seconds:g} s (train.stall_seconds); what every thread does:"
        processes.abort(Status.TRANSIENT, why, shows_stacks=True)
