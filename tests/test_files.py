"""A file is there whole, or as it was before."""

import os
import pathlib

import pytest

from offsetjax.files import unfinished, write_whole
from tests.launch.fake_bucket import BUCKET, bucket, run_on


def test_a_file_and_its_folder_are_made(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a" / "b.txt"
    write_whole(path, "ä\n")
    assert path.read_bytes() == "ä\n".encode()
    write_whole(path, b"\0")
    assert path.read_bytes() == b"\0"
    assert list(path.parent.iterdir()) == [path]


def test_what_cannot_be_finished_leaves_what_was_there(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "b.txt"
    write_whole(path, "before")
    full = type(unfinished(path))

    def replace(self: pathlib.Path, target: pathlib.Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(full, "replace", replace)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link_and_a_device_a_device(tmp_path: pathlib.Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    write_whole(tmp_path / "link", "through")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "file").read_text() == "through"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "pipe", "piped")
    assert os.read(reader, 10) == b"piped"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


ON_A_BUCKET = """
import sys
from offsetjax.errors import UserError
from offsetjax.files import check_file, write_whole

write_whole(sys.argv[1] + "/a/b.txt", "whole")
check_file("calibrate", sys.argv[1] + "/a/c.json")
try:
    check_file("calibrate", "gs://typo/c.json")
except UserError as error:
    print(error)
"""


def test_a_bucket_is_written_to_and_one_that_is_none_is_told(tmp_path: pathlib.Path) -> None:
    with bucket() as store:
        printed = run_on(store, ON_A_BUCKET, f"gs://{BUCKET}", cwd=tmp_path)
        assert store.objects == {"a/b.txt": b"whole"}
    assert printed.startswith("calibrate: gs://typo cannot be written to (")
    assert printed.endswith("; give another --out\n") and printed.count("\n") == 1
    assert not [*tmp_path.iterdir()]
