"""A step on which all processes agree, when one of them has asked for it.

The processes run ahead of each other: each counts its calls of `reached`, all give their counts while they hold them,
and the step is that of the highest + 1. `multihost_utils.reached_preemption_sync_point` does so with the numbers of
the steps, and thus misses what is asked for before the first step of a run that is resumed.
"""

import threading
from collections.abc import Callable
from typing import Any

import jax

from offsetjax.parallel import processes


class Agreement:
    """One step; each process must call `reached` the same number of times.

    Args:
        key: of this agreement, the same in all processes and used for no other.
        agreed: called with what was asked and the highest number of calls, before any process can reach the step.
        failed: called with what was asked, where not every process answers for a minute.
    """

    def __init__(
        self,
        key: str,
        agreed: Callable[[str, int], Any] = lambda asked, calls: None,
        failed: Callable[[str], Any] = lambda asked: None,
        calls: int = 0,
    ) -> None:
        self.calls, self._at = calls, float("inf")
        self._key, self._agreed, self._failed = key, agreed, failed
        self._counting = threading.Lock()
        if processes.are_several():
            processes.subscribe(f"{key}/asked", self._agree)

    def ask(self, what: str = "") -> None:
        """Asks all processes, from any thread of any of them."""
        if processes.are_several():
            processes.broadcast(f"{self._key}/asked", what)
            return
        with self._counting:
            self._settle(what, self.calls)

    def reached(self) -> bool:
        """Counts one call; whether the step is reached."""
        with self._counting:
            self.calls += 1
            return self.calls >= self._at

    def _agree(self, asked: str) -> None:
        with self._counting:
            try:
                counts = processes.gather(f"{self._key}/at", str(self.calls))
            except jax.errors.JaxRuntimeError:  # one of them is late by more than a minute, or gone
                self._failed(asked)
                return
            self._settle(asked, max(map(int, counts)))

    def _settle(self, asked: str, calls: int) -> None:
        self._agreed(asked, calls)
        self._at = calls + 1
