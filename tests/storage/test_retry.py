"""What may pass is tried again; what may not is raised at once."""

import errno

import pytest

from offsetjax.errors import TransientError
from offsetjax.storage.retry import retried


def test_a_read_that_fails_for_a_while_succeeds() -> None:
    failures: list[Exception] = [TimeoutError("slow"), OSError(errno.ESTALE, "Stale file handle")]

    def read() -> int:
        if failures:
            raise failures.pop()
        return 7

    assert retried(read, "a file", waits=(0.0, 0.0)) == 7


def test_what_does_not_pass_says_what_was_tried() -> None:
    def read() -> None:
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    with pytest.raises(TransientError, match=r"^gs://b/run: .*reset by peer; tried 3 times in 0 s; it may pass"):
        retried(read, "gs://b/run", waits=(0.0, 0.0))


def test_what_is_no_passing_fault_is_raised_at_once() -> None:
    tries = []

    def read() -> None:
        tries.append(1)
        raise ValueError("the file is damaged")

    with pytest.raises(ValueError, match="the file is damaged"):
        retried(read, "a file", waits=(0.0,))
    assert len(tries) == 1
