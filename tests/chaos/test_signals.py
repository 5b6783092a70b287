"""Each signal at each moment from the first line of the program on, whoever reads what it prints: its status."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.outputs import PLACES, catches, reader_that_stopped
from tests.several import ROOT

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT)
SECONDS = (0.0, 0.2, 0.6, 1.5)  # in the imports, which take most of a command's first seconds


QUICK = (reader_that_stopped, signal.SIGTERM, 0.0)
CASES = [
    pytest.param(*case, marks=() if case == QUICK else pytest.mark.chaos)
    for case in itertools.product(PLACES, SIGNALS, SECONDS)
]


@pytest.mark.parametrize(("place", "number", "seconds"), CASES)
def test_a_signal_ends_the_program_with_its_status_at_any_moment(
    place: Any, number: signal.Signals, seconds: float, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "offsetjax", "train", "--config=configs/stamps.py", f"--workdir={tmp_path}/run"]
    with place() as descriptor:
        if descriptor is None:
            command = ["/bin/sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command]
        variables = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=descriptor, stderr=descriptor)
        while not catches(process, signal.SIGTERM):
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(seconds)
        process.send_signal(number)
        began = time.monotonic()
        assert process.wait(60) == (130 if number == signal.SIGINT else 143)
    print(f"{number.name} after {seconds} s: ended in {time.monotonic() - began:.2f} s")
    assert not (tmp_path / "run").exists()
