"""A file is there whole, or as it was before."""

import pathlib

import pytest

from offsetjax.files import unfinished, write_whole


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
