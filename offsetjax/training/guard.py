"""Steps that changed nothing, seen from the loop: a warning at once, and an end where they are all that there is."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from offsetjax.data.stream import Stream
from offsetjax.errors import UserError
from offsetjax.training.rollback import RollBack

_log = logging.getLogger("offsetjax")
_SHOWN = 8  # examples


class Guard:
    """Counts the steps in a row that were skipped, from what the step counts.

    Args:
        stream: whose batches are trained on, for their examples.
        rolled_back: which of them.
        step: before the first that is looked at.
        skipped: steps up to that one; `in_a_row`: of these the last.
        most_in_a_row: after so many the training has to end; 0: never.
        max_spike: as the step has it, for the message.
    """

    def __init__(
        self,
        stream: Stream,
        rolled_back: RollBack,
        *,
        step: int,
        skipped: int,
        in_a_row: int,
        most_in_a_row: int,
        max_spike: float = 0.0,
    ) -> None:
        self._stream, self._rolled_back = stream, rolled_back
        self._before, self._skipped = skipped, skipped
        self._most, self._max_spike = most_in_a_row, max_spike
        self._looked, self.in_a_row, self._last, self._why = step, in_a_row, step, "see the log"

    def look(self, step: int, metrics: Mapping[str, Any]) -> None:
        """To be called with what each step gave, in their order, once or more; it waits for that."""
        if step <= self._looked:
            return
        self._looked, skipped = step, int(metrics["skipped"])
        if skipped == self._skipped:
            self.in_a_row = 0
            return
        self._skipped, self._last, self.in_a_row = skipped, step, self.in_a_row + 1
        self._why, count = self._reason(metrics), skipped - self._before
        if count & (count - 1) == 0:  # the 1st, 2nd, 4th, 8th …: at once, and never a flood
            examples = self._examples(step)
            _log.warning("step %d changed nothing (%d so far): %s; %s", step, skipped, self._why, examples)

    @property
    def is_over(self) -> bool:
        """Whether so many steps in a row were skipped that the training has to end."""
        return 0 < self._most <= self.in_a_row

    @property
    def first_in_a_row(self) -> int:
        """The first of the steps in a row that were skipped last."""
        return self._last - self.in_a_row + 1

    def found(self) -> str:
        """The steps in a row that were skipped, why the last was, and its examples."""
        return (
            f"steps {self.first_in_a_row} to {self._last} changed nothing (train.max_skipped_in_a_row = {self._most}); "
            f"the last: {self._why}; {self._examples(self._last)}"
        )

    def mistake(self, saved_step: int) -> UserError:
        """The error that ends a training whose guard is over."""
        back = f"it went back once, to step {self._rolled_back.to}; " if self._rolled_back else ""
        return UserError(
            f"train: {self.found()}; {back}what was trained is saved as step {saved_step}; look at these examples, or "
            "try a smaller optimizer.learning_rate or another model.dtype"
        )

    def _reason(self, metrics: Mapping[str, Any]) -> str:
        loss, grad_norm, spike = (float(metrics.get(name, 0.0)) for name in ("loss", "grad_norm", "spike"))
        found = f"loss {loss:.4g}, gradient norm {grad_norm:.4g}"
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return found
        if 0 < self._max_spike < spike:
            return f"{found}, {spike:.3g} times its running mean (train.max_spike = {self._max_spike:g})"
        return f"{found}, but what it would write is not finite"

    def _examples(self, step: int) -> str:
        numbers = self._stream.examples_of(self._rolled_back.batch_of(step))
        more = ", …" if len(numbers) > _SHOWN else ""
        return f"its examples are {', '.join(map(str, numbers[:_SHOWN]))}{more} of {self._stream.source.label}"
