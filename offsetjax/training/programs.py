"""The train step's programs, one for each size of pictures, compiled before the first step: no step waits for one."""

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import PyTree

from offsetjax.data.buckets import Size
from offsetjax.training.objective import Batch
from offsetjax.training.step import Metrics, TrainState, TrainStep

_log = logging.getLogger("offsetjax")
_FOUND = "/jax/compilation_cache/cache_hits"


@dataclass(frozen=True)
class Program:
    """What is to be compiled: a train step of batches of one size.

    Attributes:
        name: what the step is for, in the log.
        train_step: jitted.
        batch: an abstract one.
    """

    name: str
    train_step: Any
    batch: Batch


def compiled_ahead(
    programs: Sequence[Program],
    state: TrainState,
    frozen: PyTree,
    at_once: int,
    progressed: Callable[[], None] = lambda: None,
) -> list[Any]:
    """What each program was compiled to, in their order; a line in the log for each, and for all.

    Tracing is Python's, one after the other; the compiler works on several at a time meanwhile. The largest size comes
    first: what does not fit is known soon.

    Args:
        at_once: how many are compiled at a time, no more than there are processors.
        progressed: is called after each.
    """
    began, found = time.monotonic(), dict[int, Any]()
    futures: dict[Future[tuple[Any, float, bool]], int] = {}
    with _Hits() as hits, ThreadPoolExecutor(min(at_once, os.cpu_count() or 1)) as pool:
        try:
            for place, each in sorted(enumerate(programs), key=lambda item: -_elements(item[1].batch)):
                lowered = each.train_step.lower(state, frozen, each.batch)
                futures[pool.submit(_compile, lowered, hits)] = place
                progressed()
            for number, future in enumerate(as_completed(futures), start=1):
                place = futures[future]
                found[place], seconds, is_cached = future.result()
                how = "read from the compilation cache" if is_cached else "compiled"
                name = programs[place].name
                _log.info("the step for %s was %s in %.1f s (%d of %d)", name, how, seconds, number, len(futures))
                progressed()
        except BaseException:  # a signal, or a program that does not fit: what was not begun is not waited for
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    _log.info("the steps for all %d sizes are there after %.1f s", len(found), time.monotonic() - began)
    return [found[place] for place in range(len(programs))]


def by_size(train_step: Any, compiled: Iterable[tuple[Batch, Any]]) -> TrainStep:
    """The step that takes for batches such as these what was compiled for them, and else itself."""
    programs = {_shape(batch): program for batch, program in compiled}

    def step(state: TrainState, frozen: PyTree, batch: Batch) -> tuple[TrainState, Metrics]:
        return programs.get(_shape(batch), train_step)(state, frozen, batch)

    return step


def _compile(lowered: Any, hits: "_Hits") -> tuple[Any, float, bool]:
    begin, before = time.monotonic(), hits.here()
    program = lowered.compile()
    return program, time.monotonic() - begin, hits.here() > before


def _shape(batch: Batch) -> tuple[int, ...]:
    """By which batches of different sizes differ."""
    return tuple(batch["moments" if "moments" in batch else "pixels"].shape)


def _elements(batch: Batch) -> int:
    return math.prod(_shape(batch))


class _Hits:
    """Counts the programs that each thread has read from the compilation cache."""

    def __init__(self) -> None:
        self._threads: list[int] = []

    def __enter__(self) -> "_Hits":
        jax.monitoring.register_event_listener(self._on_event)
        return self

    def __exit__(self, *_: Any) -> None:
        jax.monitoring.unregister_event_listener(self._on_event)

    def here(self) -> int:
        """Those of this thread."""
        return self._threads.count(threading.get_ident())

    def _on_event(self, event: str, **_: Any) -> None:
        if event == _FOUND:
            self._threads.append(threading.get_ident())


class SizeLosses:
    """The mean loss over the steps since the last line, of all sizes and of each.

    A step's loss alone is that of one size. Values stay on the devices until a line is written.

    Args:
        size_of: the size of a step's batch.
    """

    def __init__(self, size_of: Callable[[int], Size]):
        self._size_of = size_of
        self._kept: list[tuple[int, Size, Any]] = []

    def add(self, step: int, loss: jax.Array) -> None:
        """To be called after each step."""
        self._kept.append((step, self._size_of(step), loss))

    def means(self, step: int) -> dict[str, float]:
        """`loss_of_sizes` and `loss_1152x896`, …, over the steps up to this one; those that were skipped count not."""
        taken = [(size, loss) for at, size, loss in self._kept if at <= step]
        self._kept = [each for each in self._kept if each[0] > step]
        losses = jax.device_get([loss for _, loss in taken])
        found = [(size, float(loss)) for (size, _), loss in zip(taken, losses, strict=True)]
        finite = [(size, loss) for size, loss in found if abs(loss) < float("inf")]
        if not finite:
            return {}
        by_size = {f"loss_{size}": _mean(loss for each, loss in finite if each == size) for size in _sizes(finite)}
        return {"loss_of_sizes": _mean(loss for _, loss in finite), **by_size}


def _sizes(found: Iterable[tuple[Size, float]]) -> Sequence[Size]:
    return sorted({size for size, _ in found}, key=lambda size: size.aspect)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
