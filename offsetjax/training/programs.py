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

from offsetjax.data.buckets import Size
from offsetjax.training.objective import Batch

_log = logging.getLogger("offsetjax")
_FOUND = "/jax/compilation_cache/cache_hits"


@dataclass(frozen=True)
class Program:
    """What is to be compiled: a train step of batches of one size, or a part of it.

    Attributes:
        name: in the log, such as `the step for 1152x896`.
        function: jitted.
        arguments: that it is compiled for, which may be abstract.
        place: of the batch among them; None: there is none.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    place: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the pictures of its batch."""
        return () if self.place is None else _shape(self.arguments[self.place])


def compiled_ahead(
    programs: Sequence[Program],
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
            for place, each in sorted(enumerate(programs), key=lambda item: -math.prod(item[1].shape or (0,))):
                lowered = each.function.lower(*each.arguments)
                futures[pool.submit(_compile, lowered, hits)] = place
                progressed()
            for number, future in enumerate(as_completed(futures), start=1):
                place = futures[future]
                found[place], seconds, is_cached = future.result()
                how = "read from the compilation cache" if is_cached else "compiled"
                name = programs[place].name
                _log.info("%s was %s in %.1f s (%d of %d)", name, how, seconds, number, len(futures))
                progressed()
        except BaseException:  # a signal, or a program that does not fit: what was not begun is not waited for
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    num_sizes = sum(each.place is not None for each in programs)
    _log.info("the steps for all %d sizes are there after %.1f s", num_sizes, time.monotonic() - began)
    return [found[place] for place in range(len(programs))]


def by_size(function: Any, compiled: Iterable[tuple[Program, Any]]) -> Callable[..., Any]:
    """The function that takes for batches of these programs' sizes what was compiled for them, and else itself."""
    found = {program.shape: (program.place, each) for program, each in compiled}
    (place,) = {place for place, _ in found.values() if place is not None}

    def dispatched(*arguments: Any) -> Any:
        shape = _shape(arguments[place])
        return (found[shape][1] if shape in found else function)(*arguments)

    return dispatched


def _compile(lowered: Any, hits: "_Hits") -> tuple[Any, float, bool]:
    begin, before = time.monotonic(), hits.here()
    program = lowered.compile()
    return program, time.monotonic() - begin, hits.here() > before


def _shape(batch: Batch) -> tuple[int, ...]:
    """By which batches of different sizes differ."""
    return tuple(batch["moments" if "moments" in batch else "pixels"].shape)


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

    A step's loss alone is that of one size, or of its parts. Values stay on the devices until a line is written.

    Args:
        sizes_of: those of the parts of a step's batch; one where it has no parts of different sizes.
    """

    def __init__(self, sizes_of: Callable[[int], Sequence[Size]]):
        self._sizes_of = sizes_of
        self._kept: list[tuple[int, Size, Any]] = []

    def add(self, step: int, *losses: jax.Array) -> None:
        """To be called after each step, with the losses of its parts."""
        self._kept += [(step, size, loss) for size, loss in zip(self._sizes_of(step), losses, strict=True)]

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
