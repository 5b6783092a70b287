"""SIGTERM to any process of a training: all stop at the same step.

The processes run ahead of each other, so the step has to be agreed on: each counts its calls of `reached`, all tell
their counts while they hold them, and stop at the highest + 1. `multihost_utils.reached_preemption_sync_point` does so
with the numbers of the steps, and thus misses a signal that comes before the first step of a run that is resumed.
"""

import itertools
import os
import signal
import sys
import threading
import time
from typing import Any

import jax

from offsetjax.parallel import processes

_SAME_SIGNAL_SECONDS = 1.0  # a launcher may pass on what its process group has got already
_BARRIER_MS = 60_000
_trainings = itertools.count()  # of this program: each has keys of its own, the same in all processes


class Preemption:
    """Inside its context SIGTERM is heard; the second signal, or the second Ctrl-C, ends all processes at once.

    A thread reads the signals: Python's own handlers wait while the program compiles or waits for a device.
    """

    def __init__(self) -> None:
        self._calls, self._stop_at = 0, float("inf")
        self._counting = threading.Lock()
        self._key = f"offsetjax/preempted/{next(_trainings)}"

    def __enter__(self) -> "Preemption":
        if processes.are_several():
            processes.subscribe(f"{self._key}/asked", self._agree)
        self._hears = threading.current_thread() is threading.main_thread()  # Python sets handlers in no other
        if self._hears:
            read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            # In the place of JAX's, which was set when the processes joined.
            self._handler = signal.signal(signal.SIGTERM, lambda number, frame: None)
            self._fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            threading.Thread(target=self._hear, args=(read,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._hears:
            signal.set_wakeup_fd(self._fd)
            signal.signal(signal.SIGTERM, self._handler)
            os.close(self._write)

    def reached(self) -> bool:
        """Whether all are to stop here; each process must call it the same number of times."""
        with self._counting:
            self._calls += 1
            return self._calls >= self._stop_at

    def _hear(self, read: int) -> None:
        heard: dict[int, float] = {}
        for number in iter(lambda: int.from_bytes(os.read(read, 1)), 0):
            if number not in (signal.SIGTERM, signal.SIGINT):
                continue
            if number not in heard:
                heard[number] = time.monotonic()
                if number == signal.SIGTERM:
                    self._ask()
            elif time.monotonic() - heard[number] > _SAME_SIGNAL_SECONDS:
                print("offsetjax: a second signal: ended at once, nothing more is saved", file=sys.stderr)
                processes.abort(128 + number, "a second signal")
        os.close(read)

    def _ask(self) -> None:
        print("offsetjax: SIGTERM: saves and ends after this step; a second one ends it at once", file=sys.stderr)
        if processes.are_several():
            processes.broadcast(f"{self._key}/asked", "")
        else:
            self._stop_at = 0

    def _agree(self, _: str) -> None:
        with self._counting:
            try:
                counts = processes.gather(f"{self._key}/at", str(self._calls))
            except jax.errors.JaxRuntimeError:  # one of them is late by more than a minute, or gone
                print("offsetjax: SIGTERM: not every process answers: ended at once, nothing is saved", file=sys.stderr)
                processes.abort(128 + signal.SIGTERM, "SIGTERM, to which not every process answered")
            self._stop_at = max(map(int, counts)) + 1
