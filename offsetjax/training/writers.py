"""Writers of metrics to TensorBoard and to the terminal."""

import logging
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from tensorboardX import SummaryWriter

from offsetjax.sampling.pictures import Picture, grid

_log = logging.getLogger("offsetjax")


class TensorBoard:
    """Scalars, and pictures as grids, as TensorBoard's events in the work directory."""

    def __init__(self, workdir: epath.Path, start_step: int, num_steps: int):
        del num_steps
        self._events = SummaryWriter(str(workdir), purge_step=start_step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()  # a killed process leaves what it logged

    def images(self, step: int, name: str, pictures: Sequence[Picture], about: Mapping[str, Any]) -> None:
        del about
        tag = re.sub(r"_\d+$", "", name)  # one slider over the steps
        self._events.add_image(tag, np.asarray(grid(pictures)), step, dataformats="HWC")
        self._events.flush()

    def close(self) -> None:
        self._events.close()


class Terminal:
    """A line a logged step, with the time that is left, and one for what an evaluator found."""

    def __init__(self, workdir: epath.Path, start_step: int, num_steps: int):
        del workdir, start_step
        self._num_steps = num_steps
        self._first: tuple[int, float] | None = None  # the first logged step, and when

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        text = self._progress(step, values) if "images_per_second" in values else _listed(values)
        _log.info("step %d/%d  %s", step, self._num_steps, text)

    def images(self, step: int, name: str, pictures: Sequence[Picture], about: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass

    def _progress(self, step: int, values: Mapping[str, float]) -> str:
        now, text = time.monotonic(), f"loss {values['loss']:.4f}"
        if self._first is None:  # its time is that of the compilation, which says nothing of the rest
            self._first = step, now
            return text
        first_step, first = self._first
        left = (self._num_steps - step) * (now - first) / max(1, step - first_step)
        mfu = f"  MFU {values['mfu']:.1%}" if "mfu" in values else ""
        goodput = f"  goodput {values['goodput']:.0%}" if "goodput" in values else ""
        return text + f"  {values['images_per_second']:.1f} images/s{mfu}{goodput}  {format_duration(left)} left"


def _listed(values: Mapping[str, float]) -> str:
    """All values but those of single timesteps."""
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items() if not re.search(r"_t\d+$", name))


def format_duration(seconds: float) -> str:
    """`75 -> "1:15"`, `3675 -> "1:01:15"`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
