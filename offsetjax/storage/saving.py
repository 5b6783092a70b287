"""When a training saves: every so many steps, every so many minutes, and where it ends."""

import itertools
import time
from typing import Any

import orbax.checkpoint as ocp
from jaxtyping import PyTree

from offsetjax.parallel import processes
from offsetjax.parallel.agreement import Agreement
from offsetjax.storage import checkpoint, record
from offsetjax.storage.lock import WorkdirLock

_savers = itertools.count()  # of this program: each has keys of its own, the same in all processes


class Saver:
    """The saves of one training.

    Args:
        lock: of the work directory, at which each save looks.
        state_bytes: what a checkpoint takes, for the message where it does not fit.
        every_minutes: of the first process's clock, on a step on which all agree; 0: never.
    """

    def __init__(
        self,
        manager: ocp.CheckpointManager,
        lock: WorkdirLock,
        state_bytes: int,
        every_steps: int,
        every_minutes: float = 0.0,
    ) -> None:
        self._manager, self._lock, self._bytes = manager, lock, state_bytes
        self._steps, self._seconds = every_steps, 60 * every_minutes
        self._number, self._rounds = next(_savers), itertools.count()
        self._calls, self._saved_step = 0, -1
        self._saved, self._is_asked = 0.0, False
        self._agreement: Agreement | None = None
        self._begin_round()

    def is_due(self, step: int) -> bool:
        """Whether a step is to be saved; each process must ask at each step."""
        self._calls += 1
        by_time = self._is_due_by_time()  # which counts this step, whatever the other says
        return by_time or step % self._steps == 0

    def _is_due_by_time(self) -> bool:
        if self._agreement is None:
            return False
        if not self._is_asked and time.monotonic() - self._saved > self._seconds:
            self._is_asked = True
            if processes.is_first():
                self._agreement.ask()
        return self._agreement.reached()

    def save(self, step: int, state: PyTree, data: dict[str, Any]) -> None:
        """Saves in the background; the state may be donated at once.

        Raises:
            UserError: another training has taken over the work directory.
            StorageError, TransientError: it, or the save before it, failed.
        """
        if step == self._saved_step:
            return
        self._lock.check()
        record.note_saved(self._manager)
        checkpoint.save(self._manager, step, state, data)
        self._saved_step = step
        self._begin_round()

    def finish(self) -> None:
        """Waits for the last save; raises as `save` does."""
        checkpoint.wait(self._manager, self._bytes)
        record.note_saved(self._manager)

    def _begin_round(self) -> None:
        self._saved, self._is_asked = time.monotonic(), False
        if self._seconds:
            key = f"offsetjax/saves/{self._number}/{next(self._rounds)}"
            self._agreement = Agreement(key, calls=self._calls)
