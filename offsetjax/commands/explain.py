"""What a user sees of an error, and with which exit status a command ends."""

import argparse
import os
import sys

from offsetjax import log
from offsetjax.errors import PreemptedError, Status, StorageError, TransientError, UserError, kind_of, one_line
from offsetjax.parallel import signals

_REMEDIES = {
    Status.MISTAKE: "see to it and try again",
    Status.TRANSIENT: "it may pass by itself: the same command tries again",
}


def explain(error: BaseException, options: argparse.Namespace | None = None) -> int:
    """Reports an error to the user, and returns the exit status.

    Args:
        options: of the command line.
    """
    from offsetjax import faults
    from offsetjax.files import storage_error

    options = options or argparse.Namespace()
    status, resumes = kind_of(error), getattr(options, "resumes", "")
    match error:
        case UserError() | StorageError() | TransientError():
            text = f"error: {error}"
        case PreemptedError():
            text = f"ended by {signals.name(error.number)} {error}; the same command resumes from there"
        case signals.Interrupted() if status == Status.PREEMPTED:
            text = f"ended by {signals.name(error.number)}"
        case KeyboardInterrupt():
            text = "interrupted" + (f"; the same command resumes {resumes}" if resumes else "")
        case _ if status == Status.STORAGE:  # many an error does not say of which place it is
            text = f"error: {storage_error(getattr(error, 'filename', None) or _place(options), error)}"
        case OSError() if status in _REMEDIES:
            what = f"{error.filename}: {error.strerror}" if error.filename else one_line(error)
            text = f"error: {what}; {_REMEDIES[status]}"
        case _ if status in _REMEDIES:
            text = f"error: {type(error).__name__}: {one_line(error)}; {_REMEDIES[status]}"
        case _:
            text = f"error: a fault of offsetjax: {type(error).__name__}: {one_line(error)}"
    # A number of the system's says enough; where else an error came from, only the stack trace does.
    is_expected = isinstance(error, UserError | StorageError | TransientError | PreemptedError | KeyboardInterrupt)
    is_expected |= isinstance(error, OSError) and not isinstance(error, ConnectionError) and status != Status.FAULT
    if getattr(options, "debug", False) or not is_expected:
        log.write(faults.trace(error))
    if status == Status.FAULT and (report := faults.write_report(error, sys.argv[1:], _folder(options))):
        text += f"; all that a report needs is in {report}"
    log.say(text)
    return status


def _place(options: argparse.Namespace) -> str:
    """Where a command writes."""
    return str(getattr(options, "out", "") or _folder(options) or os.curdir)


def _folder(options: argparse.Namespace) -> str:
    """Of the run that a command works on; "" where it is none."""
    workdir = getattr(options, "workdir", "")
    return workdir if isinstance(workdir, str) else ""
