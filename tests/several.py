"""Several real processes of one command on this machine, that find each other as those of a pod do."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[1]
HEARTBEAT_SECONDS = 10
# Without what only tests have, which libraries import where there is one; that takes longer than all else.
WITHOUT_TORCH = {"PYTHONPATH": f"{ROOT / 'tests' / 'without_torch'}:{ROOT}"}


class Several:
    """`count` processes, their output in `folder`; what is still alive at the end of the context is killed.

    Args:
        command: what follows `python`, for all; or one for each.
        devices: of each process.
        environment: more variables, for all.
    """

    def __init__(
        self,
        count: int,
        command: Sequence[str] | Sequence[Sequence[str]],
        folder: Path,
        devices: int = 1,
        **environment: str,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.outputs = [folder / f"{index}.log" for index in range(count)]
        commands = [command] * count if isinstance(command[0], str) else command
        base = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
        base |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)} | WITHOUT_TORCH
        base |= {"OFFSETJAX_HEARTBEAT_SECONDS": str(HEARTBEAT_SECONDS)}
        if count > 1:
            base |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": str(count)}
        self.processes = []
        for index, (output, own) in enumerate(zip(self.outputs, commands, strict=True)):
            variables = base | ({"JAX_PROCESS_ID": str(index)} if count > 1 else {}) | environment
            with output.open("w") as file:
                self.processes.append(
                    subprocess.Popen([sys.executable, *own], env=variables, stdout=file, stderr=file)  # type: ignore[list-item]
                )

    def __enter__(self) -> "Several":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def send(self, number: signal.Signals, index: int) -> None:
        """Sends one process a signal."""
        self.processes[index].send_signal(number)

    def wait(self, seconds: float) -> list[int]:
        """The exit statuses, as a shell gives them, once all have ended within this time."""
        end = time.monotonic() + seconds
        for process in self.processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"still running after {seconds} s:\n{self.text()}") from None
        return [
            process.returncode if process.returncode >= 0 else 128 - process.returncode for process in self.processes
        ]

    def output(self, index: int) -> str:
        """What one process has printed."""
        return self.outputs[index].read_text()

    def text(self) -> str:
        """What all have printed, for a failed assertion."""
        return "\n".join(f"--- process {index}\n{self.output(index)[-4000:]}" for index in range(len(self.outputs)))

    def wait_for(self, what: Callable[[], object], seconds: float = 900) -> None:
        """Waits until something is so."""
        end = time.monotonic() + seconds
        while not what():
            ended = [process.poll() for process in self.processes]
            assert None in ended, f"all ended, {ended}:\n{self.text()}"
            assert time.monotonic() < end, f"it did not come:\n{self.text()}"
            time.sleep(0.02)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as made:
        made.bind(("", 0))
        return made.getsockname()[1]
