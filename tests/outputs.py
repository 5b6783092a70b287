"""Where a program may print to: places that fail, or wait for ever; and whether it hears signals yet."""

import contextlib
import os
import pty
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def closed_pipe() -> Iterator[int]:
    """A pipe whose reader has gone."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


@contextlib.contextmanager
def closed_terminal() -> Iterator[int]:
    """A terminal that was closed."""
    leader, follower = pty.openpty()
    os.close(leader)
    yield follower
    os.close(follower)


@contextlib.contextmanager
def full_disk() -> Iterator[int]:
    """A file on a full disk."""
    full = os.open("/dev/full", os.O_WRONLY)
    yield full
    os.close(full)


@contextlib.contextmanager
def reader_that_stopped() -> Iterator[int]:
    """A full pipe whose reader does not read."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, bytes(4096))
    os.set_blocking(write, True)
    yield write
    os.close(write)
    os.close(read)


@contextlib.contextmanager
def not_open() -> Iterator[None]:
    """A program is started without the descriptors."""
    yield None


PLACES = [closed_pipe, closed_terminal, full_disk, reader_that_stopped, not_open]


def catches(process: subprocess.Popen[Any], number: int) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    [mask] = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")]
    return bool(int(mask, 16) >> (number - 1) & 1)
