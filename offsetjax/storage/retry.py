"""Reads that are tried again: a bucket's 503, a lost mount or a time-out is not the end of a run."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from offsetjax.errors import Status, TransientError, kind_of, one_line

_log = logging.getLogger("offsetjax")
Result = TypeVar("Result")

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds between two tries


def retried(read: Callable[[], Result], what: str, waits: tuple[float, ...] | None = None) -> Result:
    """The result of a read, which is retried with longer and longer pauses while its errors are transient.

    Args:
        what: is read, for the messages.
        waits: between the tries, in seconds; None is `WAITS`.

    Raises:
        TransientError: the last try failed with a transient error, too.
        Exception: of any other kind, as the read raises it, at once.
    """
    waits = WAITS if waits is None else waits
    for wait in (*waits, None):
        try:
            return read()
        except Exception as error:
            if kind_of(error) != Status.TRANSIENT:
                raise
            if wait is None:
                raise TransientError(
                    f"{what}: {one_line(error)}; tried {len(waits) + 1} times in {sum(waits):g} s; it may pass by "
                    "itself: the same command tries again"
                ) from error
            _log.warning("%s: %s; trying again in %g s", what, one_line(error), wait)
            time.sleep(wait)
    raise AssertionError
