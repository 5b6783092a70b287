"""A signal to any process of a training: all save the same step, and end."""

import itertools
from contextlib import ExitStack
from typing import Any

from offsetjax import log
from offsetjax.errors import PreemptedError
from offsetjax.parallel import processes, signals
from offsetjax.parallel.agreement import Agreement

_trainings = itertools.count()  # of this program: each has keys of its own, the same in all processes


class Preemption:
    """Inside its context SIGTERM, SIGHUP, SIGQUIT and Ctrl-C are heard; a second one ends all processes at once.

    Before a step has been made there is nothing to save, and the first ends them at once.
    """

    def __init__(self) -> None:
        self._number, self._context = 0, ExitStack()

    def __enter__(self) -> "Preemption":
        self._agreement = Agreement(f"offsetjax/preempted/{next(_trainings)}", self._agreed, self._failed)
        self._context.enter_context(signals.heard(signals.listener(processes.abort, self._ask)))
        return self

    def __exit__(self, *_: Any) -> None:
        self._context.close()

    def reached(self) -> bool:
        """Whether all are to stop here; each process must call it the same number of times, first before any step."""
        signals.claim()
        return self._agreement.reached()

    def stopped(self, where: str) -> PreemptedError:
        """The exception that ends a training that stops, such as "after step 7"."""
        return PreemptedError(where, self._number)

    def _ask(self, number: int) -> None:
        self._agreement.ask(str(int(number)))
        log.say(f"{signals.name(number)}: saves and ends after this step; a second one ends it at once")

    def _agreed(self, asked: str, calls: int) -> None:
        self._number = int(asked)
        if calls <= 1:  # the first step is not made yet, on any of them
            processes.abort(signals.status_of(self._number), signals.ended_with_nothing(self._number))

    def _failed(self, asked: str) -> None:
        why = f"{signals.name(int(asked))}: not every process answers: ended at once, nothing is saved"
        processes.abort(signals.status_of(int(asked)), why)
