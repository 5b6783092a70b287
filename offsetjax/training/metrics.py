"""Metrics to `metrics.jsonl`, to TensorBoard and to the terminal."""

import contextlib
import json
import logging
import math
import re
import time
from collections.abc import Iterator, Mapping

import jax
from etils import epath
from tensorboardX import SummaryWriter

from offsetjax.files import write_whole

_log = logging.getLogger("offsetjax")


class MetricsWriter:
    """A line of JSON, and TensorBoard scalars, for each logged step, and one for each watch's values.

    Lines of steps that a resumed run writes again are dropped when it opens: those after `start_step`, and all at 0. Of
    several processes the first writes.
    """

    def __init__(self, workdir: epath.PathLike, start_step: int, num_steps: int):
        self._file = epath.Path(workdir) / "metrics.jsonl"
        lines = self._file.read_text().splitlines(keepends=True) if self._file.exists() else []
        self._kept = [line for line in lines if line.endswith("\n") and start_step and _step_of(line) <= start_step]
        self._is_local = "://" not in str(workdir)
        self._writes = jax.process_index() == 0
        if self._writes:
            write_whole(self._file, "".join(self._kept))
            self._events = SummaryWriter(str(workdir), purge_step=start_step + 1)
        self._num_steps, self._began = num_steps, time.monotonic()
        self._first_written: tuple[int, float] | None = None
        self._seconds_before = json.loads(self._kept[-1])["time_seconds"] if self._kept else 0.0

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one step's values; `time_seconds` is the training's wall-clock, resumptions included."""
        if not self._writes:
            return
        elapsed = self._record(step, values)
        text = f"step {step}/{self._num_steps}  loss {values['loss']:.4f}"
        if self._first_written is None:  # its time is that of the compilation, which says nothing of the rest
            self._first_written = step, elapsed
        else:
            first_step, first_elapsed = self._first_written
            left = (self._num_steps - step) * (elapsed - first_elapsed) / (step - first_step)
            mfu = f"  MFU {values['mfu']:.1%}" if "mfu" in values else ""
            text += f"  {values['images_per_second']:.1f} images/s{mfu}  {format_duration(left)} left"
        _log.info(text)

    def write_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Writes what a watch saw, as a line of its own."""
        if not self._writes:
            return
        self._record(step, values)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items() if not re.search(r"_t\d+$", name))
        _log.info("step %d/%d  %s", step, self._num_steps, shown)

    def _record(self, step: int, values: Mapping[str, float]) -> float:
        elapsed = time.monotonic() - self._began
        line = json.dumps({"step": step, **values, "time_seconds": round(self._seconds_before + elapsed, 3)}) + "\n"
        if self._is_local:
            with self._file.open("a") as file:
                file.write(line)
        else:  # object stores cannot append
            self._kept.append(line)
            self._file.write_text("".join(self._kept))
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()  # a killed process leaves what it logged
        return elapsed

    def close(self) -> None:
        """Flushes the events."""
        if self._writes:
            self._events.close()


class StepClock:
    """Seconds a step between two logs, and how much of them was waiting for data; pauses do not count.

    With `ideal_seconds`, those of a step whose model FLOPs are all done at the devices' peak, it also tells the share
    of the peak that was reached (MFU, arXiv 2204.02311).
    """

    def __init__(self, start_step: int, global_batch_size: int, ideal_seconds: float | None = None):
        self._step, self._batch, self._ideal = start_step, global_batch_size, ideal_seconds
        self._began, self._waited = time.monotonic(), 0.0

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """The time inside is waiting."""
        begin = time.monotonic()
        yield
        self._waited += time.monotonic() - begin

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside does not count."""
        begin = time.monotonic()
        yield
        self._began += time.monotonic() - begin

    def lap(self, step: int) -> dict[str, float]:
        """The rates since the last lap."""
        now, steps = time.monotonic(), max(1, step - self._step)
        seconds, waited = (now - self._began) / steps, self._waited / steps
        self._began, self._waited, self._step = now, 0.0, step
        rates = {
            "images_per_second": round(self._batch / seconds, 3),
            "step_seconds": round(seconds, 5),
            "data_wait_seconds": round(waited, 5),
        }
        return rates | ({"mfu": round(self._ideal / seconds, 5)} if self._ideal else {})


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # a crash of the machine can leave anything
        return math.inf


def format_duration(seconds: float) -> str:
    """`75 -> "1:15"`, `3675 -> "1:01:15"`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
