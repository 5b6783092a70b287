"""Steps that changed nothing, seen from the loop: a warning at once, and an end where they are all that there is."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from offsetjax.data.stream import Stream
from offsetjax.errors import UserError

_log = logging.getLogger("offsetjax")
_SHOWN = 8  # examples


class Guard:
    """Counts the steps in a row that were skipped, from what the step counts.

    Args:
        stream: whose batches are trained on, for their examples.
        skipped: steps before the first that is looked at.
        most_in_a_row: after so many the training has to end; 0: never.
        max_spike: as the step has it, for the message.
    """

    def __init__(self, stream: Stream, skipped: int, most_in_a_row: int, max_spike: float = 0.0) -> None:
        self._stream, self._before, self._skipped = stream, skipped, skipped
        self._most, self._max_spike = most_in_a_row, max_spike
        self._in_a_row, self._last, self._why = 0, 0, ""

    def look(self, step: int, metrics: Mapping[str, Any]) -> None:
        """To be called with what each step gave, in their order; it waits for that."""
        skipped = int(metrics["skipped"])
        if skipped == self._skipped:
            self._in_a_row = 0
            return
        self._skipped, self._last, self._in_a_row = skipped, step, self._in_a_row + 1
        self._why, count = self._reason(metrics), skipped - self._before
        if count & (count - 1) == 0:  # the 1st, 2nd, 4th, 8th …: at once, and never a flood
            examples = self._examples(step)
            _log.warning("step %d changed nothing (%d so far): %s; %s", step, skipped, self._why, examples)

    @property
    def is_over(self) -> bool:
        """Whether so many steps in a row were skipped that the training has to end."""
        return 0 < self._most <= self._in_a_row

    def mistake(self, saved_step: int) -> UserError:
        """The error that ends it: the steps, why the last was skipped, and its examples."""
        first = self._last - self._in_a_row + 1
        return UserError(
            f"train: steps {first} to {self._last} changed nothing (train.max_skipped_in_a_row = {self._most}); the "
            f"last: {self._why}; {self._examples(self._last)}; what was trained is saved as step {saved_step}; look at "
            "these examples, or try a smaller optimizer.learning_rate or another model.dtype"
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
        numbers = self._stream.examples_of(step - 1)
        more = ", …" if len(numbers) > _SHOWN else ""
        return f"its examples are {', '.join(map(str, numbers[:_SHOWN]))}{more} of {self._stream.source.label}"
