"""How fast a training from cached latents is on one GPU, beside PyTorch's: `… tests/benchmarks -m slow -s -k gpu`."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def measured(*arguments: str, **environment: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.gpu_step", *arguments]
    done = subprocess.run(
        command,
        cwd=pathlib.Path(__file__).parents[2],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="there is no GPU")
@pytest.mark.parametrize(
    "arguments",
    [
        ("--family=sd2", "--resolution=512", "--batch=32"),
        ("--family=sdxl", "--resolution=1024", "--batch=8", "--checkpointing"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_step_on_a_gpu_is_no_slower_than_pytorchs(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    found = measured(*arguments, JAX_PLATFORMS="cuda", XLA_PYTHON_CLIENT_PREALLOCATE="false")
    with capsys.disabled():
        print(f"\n{' '.join(arguments)}: {json.dumps(found, indent=1)}")
    assert found["ratio"] >= 1.0
    assert found["mfu"] is None or 0 < found["mfu"] < 1


@pytest.mark.parametrize(
    "arguments", [("--family=sd2",), ("--family=sdxl", "--checkpointing")], ids=lambda arguments: arguments[0]
)
def test_the_comparison_can_be_tried_without_a_gpu(arguments: tuple[str, ...]) -> None:
    found = measured(*arguments, "--resolution=64", "--batch=2", "--steps=1", "--narrow", JAX_PLATFORMS="cpu")
    assert found["images_per_second"] == pytest.approx(2 / found["seconds"])
    assert found["ratio"] == pytest.approx(found["torch_seconds"] / found["seconds"], rel=0.5)
