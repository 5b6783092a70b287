"""What a training logs, and who writes it: JSON lines, TensorBoard, the terminal, or a writer of another package.

A writer is a class with `scalars`, `images` and `close`, and a function that opens it, which
`WRITERS.register(name, function)` makes known to `train.writers`.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
from etils import epath

from offsetjax.config.registries import WRITERS
from offsetjax.errors import one_line
from offsetjax.sampling.pictures import Picture
from offsetjax.training.goodput import Goodput
from offsetjax.training.pace import Paces

_log = logging.getLogger("offsetjax")


class Writer(Protocol):
    """Takes what a training logs, in the order of the steps."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """The values of a step, or what an evaluator found after it; they may be NaN or infinite."""

    def images(self, step: int, name: str, pictures: Sequence[Picture], about: Mapping[str, Any]) -> None:
        """Pictures that were drawn after a step.

        Args:
            name: of what drew them, and the step: `step_500`.
            about: how they were drawn.
        """

    def close(self) -> None:
        """Nothing comes after it."""


class OpenWriter(Protocol):
    """Opens a writer for the steps after `start_step`; what it may hold of later ones is to be forgotten."""

    def __call__(self, workdir: epath.Path, start_step: int, num_steps: int) -> Writer: ...


class Metrics:
    """All writers of a training. One that fails is reported once, by its name, and never ends the training."""

    def __init__(self, openers: Mapping[str, Callable[[], Writer]]):
        self._openers, self._reported = openers, set[str]()
        self._writers: dict[str, Writer] = {}
        self._each(lambda writer: None)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Writer.scalars`."""
        self._each(lambda writer: writer.scalars(step, values))

    def images(self, step: int, name: str, pictures: Sequence[Picture], about: Mapping[str, Any]) -> None:
        """See `Writer.images`."""
        self._each(lambda writer: writer.images(step, name, pictures, about))

    def close(self) -> None:
        """Closes all writers."""
        for name, writer in self._writers.items():
            with self._reporting(name):
                writer.close()

    def _each(self, act: Callable[[Writer], None]) -> None:
        for name, opener in self._openers.items():
            with self._reporting(name):
                if name not in self._writers:  # or it failed to open, and may not do so again
                    self._writers[name] = opener()
                act(self._writers[name])

    @contextlib.contextmanager
    def _reporting(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a service that is down, a full disk: others' code, which may raise anything
            if name not in self._reported:
                self._reported.add(name)
                _log.warning("train.writers: %s failed (%s); the training continues", name, one_line(error))


def open_metrics(names: Sequence[str], workdir: epath.PathLike, start_step: int, num_steps: int) -> Metrics:
    """The writers of these names. Of several processes the first writes.

    Raises:
        UserError: an unknown name.
    """
    openers: dict[str, OpenWriter] = {name: WRITERS[name] for name in names}
    if jax.process_index() != 0:
        return Metrics({})
    folder = epath.Path(workdir)
    return Metrics({name: _opening(opener, folder, start_step, num_steps) for name, opener in openers.items()})


def _opening(opener: OpenWriter, workdir: epath.Path, start_step: int, num_steps: int) -> Callable[[], Writer]:
    return lambda: opener(workdir, start_step, num_steps)


class StepClock:
    """Seconds a step between two logs, and how much of them was waiting for data; pauses do not count.

    Of several processes the first also says how they compare, see `pace.py`.

    With `ideal_seconds`, those of a step whose model FLOPs are all done at the devices' peak, it also gives the share
    of the peak that was reached (MFU, arXiv 2204.02311). Of steps that differ each is a function of the step.
    """

    def __init__(
        self,
        start_step: int,
        global_batch_size: int | Callable[[int], int],
        goodput: Goodput,
        ideal_seconds: float | Callable[[int], float] | None = None,
    ):
        self._step, self._batch, self._goodput, self._ideal = start_step, global_batch_size, goodput, ideal_seconds
        self._began, self._waited, self._elsewhere, self._is_first = time.monotonic(), 0.0, 0.0, True
        self._paces = Paces()

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """The time inside is waiting."""
        begin = time.monotonic()
        with self._goodput.spent_on("data"):
            yield
        self._waited += time.monotonic() - begin

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The time inside is no work of this process: it waits for devices or for storage."""
        begin = time.monotonic()
        yield
        self._elsewhere += time.monotonic() - begin

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside does not count: something is evaluated."""
        begin = time.monotonic()
        with self._goodput.spent_on("evaluation"):
            yield
        self._began += time.monotonic() - begin

    def lap(self, step: int) -> dict[str, float]:
        """The rates since the last lap."""
        now, steps = time.monotonic(), max(1, step - self._step)
        batch, ideal = (self._mean(each, step) for each in (self._batch, self._ideal))
        seconds, waited, elsewhere = (now - self._began) / steps, self._waited / steps, self._elsewhere / steps
        self._began, self._waited, self._elsewhere, self._step = now, 0.0, 0.0, step
        rates = {
            "images_per_second": round(batch / seconds, 3),
            "step_seconds": round(seconds, 5),
            "data_wait_seconds": round(waited, 5),
            "goodput": round(self._goodput.share(), 5),
        }
        self._goodput.write(is_last=False)
        if not self._is_first:  # the first lap has the compilation
            rates |= self._paces.compare(waited, max(0.0, seconds - waited - elsewhere), seconds)
        self._is_first = False
        return rates | ({"mfu": round(ideal / seconds, 5)} if ideal else {})

    def _mean(self, value: Any, step: int) -> float:
        """The mean of a value over the steps since the last lap, up to this one."""
        steps = range(min(self._step, step - 1) + 1, step + 1)
        return sum(map(value, steps)) / len(steps) if callable(value) else value or 0.0
