"""How fast an export is beside a copy: `launch/local.sh test tests/benchmarks -m slow -s -k export` prints it.

Both read a checkpoint from the disk and write as many bytes to it, in turns, for timings on one machine drift together.
"""

import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from offsetjax.exporting.export import export
from tests.large_models import MB, family_config, import_model, run_config, write_model
from tests.processes import call

ROUNDS = 5


@pytest.fixture
def workdir(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A training of no steps of Stable Diffusion 1's denoiser, 3.4 GB."""
    write_model(tmp_path / "model", family_config("stable_diffusion_1"), "float16")
    size, _ = call(import_model, run_config(tmp_path / "model"), tmp_path / "run", seconds=600)
    shutil.rmtree(tmp_path / "model")
    print(f"{size / MB:.0f} MB")
    yield tmp_path / "run"
    shutil.rmtree(tmp_path)


def _copy(state: pathlib.Path, out: pathlib.Path) -> None:
    """The plainest program that reads and writes as much."""
    buffer = bytearray(1 << 21)
    with out.open("wb", buffering=0) as target:
        for file in state.rglob("*"):
            if file.is_file():
                with file.open("rb", buffering=0) as source:
                    while count := source.readinto(buffer):
                        target.write(memoryview(buffer)[:count])


def _drop_from_cache(folder: pathlib.Path) -> None:
    """Lets the next read be one from the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _timed(function: Callable[[], object], out: pathlib.Path, source: pathlib.Path) -> float:
    """Seconds until all that it wrote to `out` is on the disk."""
    _drop_from_cache(source)
    begin = time.perf_counter()
    function()
    for file in [out, *out.rglob("*")]:
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    seconds = time.perf_counter() - begin
    (shutil.rmtree if out.is_dir() else pathlib.Path.unlink)(out)
    return seconds


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_an_export_is_nearly_as_fast_as_a_copy(workdir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    state, out = workdir / "checkpoints" / "0" / "state", tmp_path / "out.safetensors"
    written = {
        "copy": lambda: _copy(state, out),
        "diffusers": lambda: export(workdir, out),
        "single_file": lambda: export(workdir, out, form="single_file"),
    }
    times: dict[str, list[float]] = {name: [] for name in written}
    for function in written.values():  # tracing the denoiser, loading libraries
        _timed(function, out, state)
    for _ in range(ROUNDS):
        for name, function in written.items():
            times[name].append(_timed(function, out, state))
    copy = np.median(times["copy"])
    ratios = {name: float(copy / np.median(each)) for name, each in times.items()}
    for name, ratio in ratios.items():
        seconds = " ".join(f"{each:.2f}" for each in times[name])
        print(f"{name:>12}  {np.median(times[name]):.2f} s  {ratio:.2f} of a copy's speed  ({seconds})")
    assert min(ratios.values()) >= 0.7
