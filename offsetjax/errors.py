"""Kinds of error: whose it is to do something, as an exit status; and the exceptions of each kind.

    status            what it is                             who does something about it
    2  MISTAKE        settings, data, paths                  the user; the same again would fail again
    70 FAULT          a fault of this program's              its authors; the stack trace is kept
    74 STORAGE        full, read-only, quota, gone           a person, about the storage
    75 TRANSIENT      a network, a bucket, a device          whoever started it starts it again, after a pause
    130 INTERRUPTED   Ctrl-C                                 nobody
    143 PREEMPTED     SIGTERM, SIGHUP, SIGQUIT               whoever started it, when it may

What another library raises is of the kind that its number, its HTTP status, its gRPC code or its words say.
"""

import enum
import errno
import os
import re
import signal


class Status(enum.IntEnum):
    """Exit statuses; those above 2 and below 128 are of sysexits.h."""

    DONE = 0
    MISTAKE = 2
    FAULT = 70
    STORAGE = 74
    TRANSIENT = 75
    INTERRUPTED = 130
    PREEMPTED = 143


class UserError(Exception):
    """A mistake in the configuration, the data, a checkpoint or a path.

    Its text is one line: what is wrong, where, and the remedy. The command line prints it and exits with status 2.
    """


class StorageError(Exception):
    """Storage that needs a person: full, read-only, over its quota, gone. One line with the path; exit status 74."""


class TransientError(Exception):
    """What may pass by itself, and did not while it was waited for. One line with what was tried; exit status 75."""


class PreemptedError(Exception):
    """A signal came, to any of the processes: all have saved the same step, which the text names."""

    def __init__(self, where: str, number: int = signal.SIGTERM) -> None:
        super().__init__(where)
        self.number = number


# A mistake where the user gave the path; where a run writes, it is storage that has gone or was closed.
_PATHS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTEMPTY)
_ACCESS = (errno.EACCES, errno.EPERM)
_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_TRANSIENT = (
    *(errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.EAGAIN, errno.EBUSY, errno.ENOMEM, errno.ENFILE),
    *(errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE, errno.ENOTCONN, errno.ETIMEDOUT),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EMFILE),
    *(getattr(errno, name) for name in ("EREMOTEIO", "ECOMM", "ENONET", "ENOLINK") if hasattr(errno, name)),
)
# What C++ libraries (TensorStore, XLA, gRPC) say without a number.
_STORAGE_WORDS = re.compile(
    "|".join([*(re.escape(os.strerror(number)) for number in _STORAGE), "quotaExceeded", "billing account"])
)
_TRANSIENT_WORDS = re.compile(
    r"\b(?:UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|Service Unavailable|Too Many Requests"
    r"|Internal Server Error|Bad Gateway|Gateway Time-?out|Cannot connect to host|Server disconnected"
    r"|(?:closed|reset) by (?:remote )?peer|Socket closed|[Tt]imed out|heartbeat timeout|[Oo]ut of memory)\b|"
    + "|".join(re.escape(os.strerror(number)) for number in _TRANSIENT if number != errno.EAGAIN)
)


_FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RecursionError, TypeError)


def kind_of(error: BaseException) -> Status:
    """Whose an error is; `Status.FAULT` where nothing says that it is another's.

    What an exception was raised from counts, and those of a group; not what was handled when it was raised.
    """
    waiting = [error]
    while waiting:
        each = waiting.pop(0)
        if (kind := _own_kind(each)) is not None:
            return kind
        waiting += each.exceptions if isinstance(each, BaseExceptionGroup) else ()
        waiting += [each.__cause__] if each.__cause__ is not None else []
    return Status.FAULT


def _own_kind(error: BaseException) -> Status | None:
    match error:
        case UserError():
            return Status.MISTAKE
        case StorageError():
            return Status.STORAGE
        case TransientError() | MemoryError():
            return Status.TRANSIENT
        case PreemptedError() | KeyboardInterrupt():
            number = getattr(error, "number", signal.SIGINT)
            return Status.INTERRUPTED if number == signal.SIGINT else Status.PREEMPTED
        case OSError():
            return _kind_of_os_error(error)
    if isinstance(error, _FAULTS):
        return Status.FAULT
    code = getattr(error, "code", getattr(error, "status", None))  # of an answer by HTTP
    if isinstance(code, int) and 400 <= code < 600:
        return _kind_of_http(code, str(error))
    return _kind_of_words(str(error))


def _kind_of_os_error(error: OSError) -> Status | None:
    number = error.errno
    if number is None:  # a bucket's, which say it in words; Pillow's too, of a picture that is broken
        if isinstance(error, FileNotFoundError | PermissionError | FileExistsError | NotADirectoryError):
            return Status.MISTAKE
        if isinstance(error, ConnectionError | TimeoutError):
            return Status.TRANSIENT
        return _kind_of_words(str(error))
    if number in _STORAGE:
        return Status.STORAGE
    if number < 0:  # a name that was not resolved
        return Status.TRANSIENT
    if number in _TRANSIENT:
        return Status.TRANSIENT
    return Status.MISTAKE if number in (*_PATHS, *_ACCESS) else None


def _kind_of_http(code: int, text: str) -> Status | None:
    if code in (408, 429) or code >= 500:
        return Status.TRANSIENT
    return _kind_of_words(text) or (Status.MISTAKE if code in (401, 403, 404) else None)


def _kind_of_words(text: str) -> Status | None:
    text = " ".join(text.split())
    if _STORAGE_WORDS.search(text):
        return Status.STORAGE
    return Status.TRANSIENT if _TRANSIENT_WORDS.search(text) else None


def storage_reason(error: BaseException) -> str:
    """What is wrong with storage, in the system's words, if an error has its number or says so; else its own line."""
    number = getattr(error, "errno", None)
    if number and number > 0:
        return os.strerror(number)
    found = _STORAGE_WORDS.search(" ".join(str(error).split()))
    return found[0] if found else one_line(error)


def one_line(error: BaseException, most: int = 200) -> str:
    """What another library's exception says, in one line of at most so many characters; if nothing, its kind.

    What cannot be shown, such as half of a surrogate pair out of a file, is escaped.
    """
    text = " ".join(str(error).split())[:most] or type(error).__name__
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
