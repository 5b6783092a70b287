"""Each error is of one kind, whoever raised it: a mistake, a passing fault, storage for a person, or ours."""

import argparse
import errno
import re
import socket
from pathlib import Path

import pytest

from offsetjax.commands.explain import explain
from offsetjax.errors import (
    PreemptedError,
    Status,
    StorageError,
    TransientError,
    UserError,
    kind_of,
    storage_reason,
)

ROOT = Path(__file__).parents[1]


class HttpError(Exception):
    """As gcsfs's, google-cloud's and requests' are: with the status of the answer."""

    def __init__(self, code: int, text: str = "") -> None:
        super().__init__(text)
        self.code = code


def _from(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


def _while_handling(error: Exception, other: BaseException) -> Exception:
    error.__context__ = other
    return error


KINDS = {
    Status.MISTAKE: [
        UserError("a"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "a.py"),
        PermissionError(errno.EACCES, "Permission denied", "a"),
        FileNotFoundError("Bucket does not exist: b"),
        HttpError(403, "b does not have storage.objects.get access"),
        HttpError(404, "The specified bucket does not exist."),
        _from(UserError("the file is full of mistakes"), OSError(errno.ENOSPC, "No space left on device")),
    ],
    Status.STORAGE: [
        StorageError("a"),
        OSError(errno.ENOSPC, "No space left on device", "a"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EROFS, "Read-only file system", "a"),
        OSError(errno.EFBIG, "File too large", "a"),
        ValueError("INTERNAL: Error writing [OS error 28: ENOSPC No space left on device] [source locations=…]"),
        _from(RuntimeError("the save failed"), OSError(errno.ENOSPC, "No space left on device")),
        ExceptionGroup("several", [ValueError("a"), OSError(errno.EDQUOT, "Disk quota exceeded")]),
        HttpError(403, "quotaExceeded: your quota of stored bytes"),
    ],
    Status.TRANSIENT: [
        TransientError("a"),
        HttpError(503, "Service Unavailable"),
        HttpError(429, "Too Many Requests"),
        HttpError(500),
        TimeoutError("the read operation timed out"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        OSError("Cannot connect to\nhost storage.googleapis.com"),
        socket.gaierror(-2, "Name or service not known"),
        OSError(errno.EIO, "Input/output error", "a"),
        OSError(errno.ESTALE, "Stale file handle", "a"),
        OSError(errno.ENOTCONN, "Transport endpoint is not connected", "a"),
        MemoryError(),
        RuntimeError("UNAVAILABLE: Error reading gs://b/run: CURL error [56]"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes."),
        RuntimeError("Gloo AllGather failed: [pair.cc:547] Connection closed by peer [127.0.0.1]:1234"),
        _from(ValueError("cannot be read"), TimeoutError()),
    ],
    Status.FAULT: [
        ZeroDivisionError(),
        KeyError("timed out"),
        TypeError("unsupported operand"),
        ValueError("INVALID_ARGUMENT: Invalid kvstore"),
        OSError("image file is truncated (3 bytes not processed)"),  # Pillow's, which has no number
        _while_handling(ZeroDivisionError(), FileNotFoundError(errno.ENOENT, "No such file or directory", "a")),
    ],
    Status.PREEMPTED: [PreemptedError("after step 7")],
    Status.INTERRUPTED: [PreemptedError("after step 7", 2), KeyboardInterrupt()],
}


@pytest.mark.parametrize(
    ("status", "error"), [(status, error) for status, errors in KINDS.items() for error in errors], ids=repr
)
def test_an_error_is_of_its_kind(status: Status, error: BaseException) -> None:
    assert kind_of(error) == status


def test_a_fault_of_ours_keeps_its_stack_and_leaves_a_report(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"seed": 7}')
    with pytest.raises(KeyError) as raised:
        {}["a fault"]  # type: ignore[index]
    assert explain(raised.value, argparse.Namespace(workdir=str(tmp_path))) == 70
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err and '{}["a fault"]' in err
    [report] = tmp_path.glob("fault_*.txt")
    assert str(report) in err.splitlines()[-1]
    text = report.read_text()
    assert '{}["a fault"]' in text and '"seed": 7' in text and "jax 0." in text and "devices: " in text


@pytest.mark.parametrize("is_debug", [False, True])
def test_a_mistake_shows_its_stack_where_that_is_asked_for(capsys: pytest.CaptureFixture[str], is_debug: bool) -> None:
    assert explain(UserError("what, where, the remedy"), argparse.Namespace(debug=is_debug)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "offsetjax: error: what, where, the remedy"
    assert (len(lines) > 1) == is_debug


def test_readme_has_the_table_of_statuses() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("## When it ends\n")[2].partition("\n## ")[0]
    assert {int(status) for status in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)} == set(Status)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.EROFS, "other words"), "Read-only file system"),
        (
            ValueError('RESOURCE_EXHAUSTED: Error writing "a/b" [domain] No space\n left on device; 300 more words'),
            None,
        ),
        (RuntimeError("a disk\nof another kind"), "a disk of another kind"),
    ],
)
def test_what_is_wrong_with_storage_is_said_in_the_systems_words(error: Exception, reason: str | None) -> None:
    assert storage_reason(error) == (reason or "No space left on device")
