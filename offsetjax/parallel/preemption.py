"""A signal to any process of a training: all save the same step, and end.

The processes run ahead of each other, so the step has to be agreed on: each counts its calls of `reached`, all give
their counts while they hold them, and stop at the highest + 1. `multihost_utils.reached_preemption_sync_point` does so
with the numbers of the steps, and thus misses a signal that comes before the first step of a run that is resumed.
"""

import itertools
import threading
from contextlib import ExitStack
from typing import Any

import jax

from offsetjax import log
from offsetjax.errors import PreemptedError
from offsetjax.parallel import processes, signals

_trainings = itertools.count()  # of this program: each has keys of its own, the same in all processes


class Preemption:
    """Inside its context SIGTERM, SIGHUP, SIGQUIT and Ctrl-C are heard; a second one ends all processes at once.

    Before a step has been made there is nothing to save, and the first ends them at once.
    """

    def __init__(self) -> None:
        self._calls, self._stop_at, self._number = 0, float("inf"), 0
        self._counting = threading.Lock()
        self._key = f"offsetjax/preempted/{next(_trainings)}"
        self._context = ExitStack()

    def __enter__(self) -> "Preemption":
        if processes.are_several():
            processes.subscribe(f"{self._key}/asked", self._agree)
        self._context.enter_context(signals.heard(signals.listener(processes.abort, self._ask)))
        return self

    def __exit__(self, *_: Any) -> None:
        self._context.close()

    def reached(self) -> bool:
        """Whether all are to stop here; each process must call it the same number of times, first before any step."""
        signals.claim()
        with self._counting:
            self._calls += 1
            return self._calls >= self._stop_at

    def stopped(self, where: str) -> PreemptedError:
        """The exception that ends a training that stops, such as "after step 7"."""
        return PreemptedError(where, self._number)

    def _ask(self, number: int) -> None:
        if processes.are_several():
            processes.broadcast(f"{self._key}/asked", str(int(number)))
        else:
            with self._counting:
                self._stop(number, self._calls)
        log.say(f"{signals.name(number)}: saves and ends after this step; a second one ends it at once")

    def _agree(self, asked: str) -> None:
        number = int(asked)
        with self._counting:
            try:
                counts = processes.gather(f"{self._key}/at", str(self._calls))
            except jax.errors.JaxRuntimeError:  # one of them is late by more than a minute, or gone
                why = f"{signals.name(number)}: not every process answers: ended at once, nothing is saved"
                processes.abort(signals.status_of(number), why)
            self._stop(number, max(map(int, counts)))

    def _stop(self, number: int, calls: int) -> None:
        if calls <= 1:  # the first step is not made yet, on any of them
            processes.abort(signals.status_of(number), signals.ended_with_nothing(number))
        self._number, self._stop_at = number, calls + 1
