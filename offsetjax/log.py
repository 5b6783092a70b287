"""What is said to the user, in a way that cannot hurt: a message that is lost ends nothing, and delays nothing.

A terminal that was closed, a pipe whose reader has gone or has stopped, a full disk: writing to them raises, or waits
for ever. Messages about signals, errors and steps go through `say`, and log records through `Handler`, which do
neither; `guard_streams` does as much for what other libraries print. Whoever has something to do does it first, and
says so afterwards.
"""

import collections
import contextlib
import faulthandler
import io
import logging
import os
import select
import sys
import time
from typing import Any, TextIO

_WAIT_SECONDS = 1.0  # for a reader that does not read; what it misses is lost
_CHUNK = 512  # a pipe that polls as writable takes this much at once, on every system (PIPE_BUF)

_stopped: set[int] = set()  # descriptors whose readers have

last_lines: collections.deque[str] = collections.deque(maxlen=200)  # for the report of a fault


def printable(text: str, keeps_lines: bool = False) -> str:
    """A text as a terminal may show it: names and messages from outside may hold what would steer one.

    Args:
        keeps_lines: whether ends of lines stay; else they are escaped too.
    """
    kept = "\n\t" if keeps_lines else "\t"
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each in kept else each.encode("unicode_escape", "surrogatepass").decode()
        for each in text
    )


def say(text: str) -> None:
    """Prints a line on standard error, after `offsetjax: `; never raises, and never waits for long."""
    text = printable(text)
    last_lines.append(text)
    write(f"offsetjax: {text}\n")


def show(*lines: str, is_exact: bool = False) -> None:
    """Prints lines on standard output, which a command was asked for; `has_lost_output` tells whether one was lost.

    Args:
        is_exact: of lines that a program reads; else what would steer a terminal is escaped.
    """
    print(*(line if is_exact else printable(line, keeps_lines=True) for line in lines), sep="\n", flush=True)


def write(text: str, to: TextIO | None = None) -> None:
    """Writes to standard error, or to another stream; never raises, and waits no longer than a second for a reader."""
    to = to or sys.stderr
    try:
        descriptor = to.fileno()
    except (OSError, ValueError, AttributeError):  # replaced by a test or a notebook; closed; never open
        with contextlib.suppress(Exception):
            to.write(text)
            to.flush()
        return
    with contextlib.suppress(OSError, ValueError):
        _write_to(descriptor, text.encode("utf-8", "backslashreplace"))


def _write_to(descriptor: int, data: bytes) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    # Who has not read for a second is not waited for again before it does.
    end = time.monotonic() + (0.0 if descriptor in _stopped else _WAIT_SECONDS)
    while data and poll.poll(max(0.0, 1000 * (end - time.monotonic()))):
        data = data[os.write(descriptor, data[:_CHUNK]) :]
    (_stopped.add if data else _stopped.discard)(descriptor)


class Handler(logging.Handler):
    """Log records on standard error, a line each: time, level, process, message."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(_Formatter())

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):
            line = printable(self.format(record), keeps_lines=True)
            last_lines.append(line)
            write(line + "\n")


class _Formatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname).1s %(index)s %(message)s", "%Y-%m-%d %H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        record.index = process_index()
        return super().format(record)


def process_index() -> str:
    """Which of several processes this one is, as its environment says."""
    return os.environ.get("JAX_PROCESS_ID") or os.environ.get("TPU_WORKER_ID") or "0"


class _Guarded(io.TextIOBase):
    """A stream to which others' code prints: what cannot be written is lost, and `has_failed` then."""

    def __init__(self, guarded: TextIO, waits: bool) -> None:
        self._guarded, self.waits, self.has_failed = guarded, waits, False

    def write(self, text: str) -> int:
        if not self.waits:
            write(text, self._guarded)
            return len(text)
        try:
            self._guarded.write(text)
        except (OSError, ValueError):
            self.has_failed = True
        return len(text)

    def flush(self) -> None:
        try:
            self._guarded.flush()
        except (OSError, ValueError):
            self.has_failed = True

    def __getattribute__(self, name: str) -> Any:
        if name in ("fileno", "isatty", "encoding", "errors", "buffer", "reconfigure"):
            return getattr(self._guarded, name)
        return super().__getattribute__(name)


class _Stderr(io.TextIOBase):
    """Standard error, whichever that is when something is written."""

    def write(self, text: str) -> int:
        write(text)
        return len(text)

    def isatty(self) -> bool:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return sys.stderr.isatty()
        return False


stream: TextIO = _Stderr()  # type: ignore[assignment]


def stacks() -> str:
    """What every thread of this process does."""
    # Through a file in memory: what writes stacks holds all threads, and would wait for a reader for ever.
    with contextlib.suppress(OSError), _memory_file() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")
    return ""


def _memory_file() -> Any:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("stacks"), "w+b")
    import tempfile

    return tempfile.TemporaryFile()


def guard_streams() -> None:
    """Of a program, at its start: what any code prints ends nothing.

    Where it was started without the descriptors 0, 1 or 2, it gets them: or one of its own files would, and what other
    libraries print would be written into that.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # the lowest that is free
    for name, waits in (("stdout", True), ("stderr", False)):
        if (stream := getattr(sys, name)) is not None:
            with contextlib.suppress(AttributeError):
                stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, _Guarded(stream, waits))


def never_wait() -> None:
    """Of a program that works for days: who does not read its standard output is not waited for either."""
    if isinstance(sys.stdout, _Guarded):
        sys.stdout.flush()
        sys.stdout.waits = False


def has_lost_output() -> bool:
    """Whether something that was printed on standard output was lost."""
    return getattr(sys.stdout, "has_failed", False)


def close_output() -> None:
    """Writes out what is still held of standard output; where that fails it is dropped, so that Python's own end of the
    program, which would change the exit status, finds nothing to write."""
    if (stream := sys.__stdout__) is None:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
