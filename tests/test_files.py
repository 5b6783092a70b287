"""A file is there whole, or as it was before."""

import os
import pathlib

import pytest

from offsetjax.cli import main
from offsetjax.config import default_config, override, validate
from offsetjax.errors import StorageError, UserError
from offsetjax.files import check_place, unfinished, write_whole
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
    with pytest.raises(StorageError, match=rf"{path}: No space .* 5 bytes"):
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


@pytest.mark.parametrize(
    "path",
    ["run", "/run", "./~", "a b", "hash#1", "a:b", "C:x", "100%", "gs", "gs://my-bucket", "gs://b_1.c/a b/#1", "é"],
)
def test_any_name_that_a_system_allows_is_a_place(path: str) -> None:
    assert check_place("--workdir", path) == path


@pytest.mark.parametrize(
    ("path", "remedy"),
    [
        ("", "--workdir is empty; give a path"),
        ("s3://b/x", "s3:// is not read or written; give a local path, or gs://BUCKET/…"),
        ("S3A://b", "s3a:// is not read"),
        ("az:/b", "az:// is not read"),
        ("https://h/x", "https:// is not read"),
        ("gdrive://h/x", "gdrive:// is not read"),
        ("file:///x/y", "write /x/y"),
        ("file:/x", "write /x"),
        ("file://localhost/x", "write /x"),
        ("gs:/b/run", "did you mean gs://b/run?"),
        ("gs:b/run", "did you mean gs://b/run?"),
        ("gs//b-1/run", "did you mean gs://b-1/run?"),
        ("GS://b-1/x", "did you mean gs://b-1/x?"),
        ("gcs://b/x", "did you mean gs://b/x?"),
        ("gs:///b/x", "it names no bucket; write gs://BUCKET/b/x"),
        ("gs://", "it names no bucket; write gs://BUCKET/"),
        ("~/run", "~ is the shell's, which has left it; write /"),
        ("a\nb", "it has a letter that cannot be shown"),
        ("a\0b", "it has a letter that cannot be shown"),
        ("\ud83d", "it has a letter that cannot be shown"),
    ],
)
def test_a_near_miss_of_a_place_is_answered(path: str, remedy: str) -> None:
    with pytest.raises(UserError) as caught:
        check_place("--workdir", path)
    assert remedy in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--config=c.py", "--workdir=s3://b/x"),
        ("sweep", "--config=file:///c.py", "--workdir=x"),
        ("calibrate", "--config=c.py", "--out=gs:/b/x.json"),
        ("sample", "--model=s3://b/x", "--prompt=a", "--out=o"),
        ("sample", "--model=x", "--lora=s3://b/x", "--prompt=a", "--out=o"),
        ("sample", "--model=x", "--compare=gs:/b", "--prompt=a", "--out=o"),
        ("export", "--workdir=x", "--out=file:/x"),
        ("data", "build", "--images=~/x", "--out=y"),
        ("data", "encode", "--config=c.py", "--out=s3://b"),
        ("data", "inspect", "--data=gcs://b/x"),
        ("report", "--workdir=x", "--workdir=gs:/b", "--out=r.html"),
        ("demo", "--out=s3://b"),
        ("plan", "--config=c.py", "--topology=cpu:1", "--out=s3://b/p.json"),
    ],
)
def test_every_command_looks_at_its_paths_before_any_work(
    arguments: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("offsetjax: error: --") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("field", ["data.path", "model.pretrained", "lora.pretrained", "noise.calibration"])
def test_so_does_a_config(field: str) -> None:
    config = default_config()
    override(config, field, "gs:/b/x")
    with pytest.raises(UserError, match=rf"{field} = 'gs:/b/x' must be a local path.*; did you mean gs://b/x\?"):
        validate(config)
