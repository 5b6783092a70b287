"""Disks that are really full: a small tmpfs, a limit on the size of files. One line, status 74, nothing half left."""

import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from tests.several import ROOT, WITHOUT_TORCH


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Three megabytes of noise, which nothing makes smaller."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(rng.integers(0, 256, (512, 512, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("noise")
    return folder


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here, which takes root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


def _files(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def _build(pictures: pathlib.Path, out: pathlib.Path, most_bytes: int | None = None) -> tuple[int, str]:
    """`offsetjax data build` in a process of its own: its status and what it says."""
    limit = "unlimited" if most_bytes is None else most_bytes // 1024
    # By a shell: what Python would run between fork and exec, jax warns of.
    command = [
        "bash",
        "-c",
        f'ulimit -f {limit}; exec "$@"',
        "bash",
        sys.executable,
        "-m",
        "offsetjax",
        "data",
        "build",
        f"--images={pictures}",
        f"--out={out}",
    ]
    variables = {**os.environ, **WITHOUT_TORCH, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    return done.returncode, done.stderr


def test_a_data_set_that_does_not_fit_is_one_line_and_fits_later(
    pictures: pathlib.Path, small_disk: pathlib.Path
) -> None:
    status, said = _build(pictures, small_disk / "data")
    assert status == 74, said
    [line] = [line for line in said.splitlines() if "error: " in line]
    assert str(small_disk) in line and "No space left on device" in line
    assert "Traceback" not in said
    assert _files(small_disk) == ["build.json"]  # from which the next one continues
    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    status, said = _build(pictures, small_disk / "data")
    assert status == 0, said
    assert [path.name for path in small_disk.iterdir()] == ["data"]
    assert not [name for name in _files(small_disk) if "unfinished" in name]


def test_a_limit_on_the_size_of_files_is_storage_too(pictures: pathlib.Path, tmp_path: pathlib.Path) -> None:
    status, said = _build(pictures, tmp_path / "data", most_bytes=1_000_000)
    assert status == 74, said
    assert "Traceback" not in said
    assert "File too large" in said and len(said.splitlines()) == 1, said
    assert _files(tmp_path) == ["build.json"]
