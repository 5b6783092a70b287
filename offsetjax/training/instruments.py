"""What a training reports of its machine: the compilation of its step, memory, speed, and traces for xprof."""

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache as jax_cache
from jaxtyping import PyTree

from offsetjax.data.buckets import Size
from offsetjax.leftovers import temporary_prefix
from offsetjax.parallel.chips import chip_of

_log = logging.getLogger("offsetjax")
_COMPILED = "/jax/core/compile/backend_compile_duration"
_FOUND = "/jax/compilation_cache/cache_hits"


@contextlib.contextmanager
def compilation_cache(workdir: epath.PathLike) -> Iterator[None]:
    """Keeps compiled programs in `workdir/compiled`, so that a run that resumes does not compile its step again.

    Where JAX_COMPILATION_CACHE_DIR or jax's own setting names another place, it is that.
    """
    if jax.config.values["jax_compilation_cache_dir"]:
        yield
        return
    jax.config.update("jax_compilation_cache_dir", str(epath.Path(workdir) / "compiled"))
    jax_cache.reset_cache()  # whether there is one is decided at the first compilation
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        jax_cache.reset_cache()


class Instruments:
    """Measures a training from its first step to its last.

    It logs how long the step takes to compile, and warns where that happens more often than there are sizes of
    pictures to be compiled yet. It logs the memory after the first step, and traces `train.profile_steps`.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        profile_steps: Sequence[int],
        devices: Sequence[Any],
        begin: int = 1,
        num_sizes: int = 1,
    ):
        self._num_sizes = num_sizes
        self._profile, self._devices, self._ran = Profile(workdir, profile_steps, begin), devices, False
        self._compilations, self._hits = 0, 0
        jax.monitoring.register_event_listener(self._on_event)
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)

    def close(self) -> None:
        """Ends a trace, and stops listening."""
        jax.monitoring.unregister_event_listener(self._on_event)
        jax.monitoring.unregister_event_duration_listener(self._on_duration)
        self._profile.close()

    def before(self, step: int) -> None:
        """To be called before a step is asked for."""
        self._profile.before(step)

    def after(self, step: int, state: PyTree) -> None:
        """To be called once a step has been asked for."""
        if not self._ran:
            jax.block_until_ready(state)
            _log_memory(self._devices)
            self._ran = True
        self._profile.after(step, state)

    def _on_event(self, event: str, **_: Any) -> None:
        self._hits += event == _FOUND

    def _on_duration(self, event: str, duration_secs: float, **details: Any) -> None:
        if event != _COMPILED:
            return
        hits, self._hits = self._hits, 0
        if details.get("fun_name") != "jit(train_step)":
            return
        self._compilations += 1
        how = "read from the compilation cache" if hits else "compiled"
        of_size = f", for size {self._compilations} of {self._num_sizes}" if self._num_sizes > 1 else ""
        _log.info("the step was %s in %.1f s%s", how, duration_secs, of_size)
        if self._compilations > self._num_sizes:
            warnings.warn(
                f"the step was compiled {self._compilations} times: what it takes has changed its shape or its place",
                RuntimeWarning,
                stacklevel=2,
            )


def ideal_seconds(count_flops: Callable[[], int], devices: Any) -> float | None:
    """How long a step would take if its devices did the model's matrix products at their peak, and nothing else.

    None where a device's peak is not known.

    Args:
        count_flops: gives those of the model, of one step; they are counted where they are of use.
    """
    chip = chip_of(devices[0].device_kind)
    return count_flops() / (chip.peak_flops * len(devices)) if chip else None


def ideal_of_sizes(
    flops_of: Callable[[Size, int], int], devices: Any, sizes: Mapping[Size, int]
) -> dict[Size, float] | None:
    """The same for each size, of which a batch has so many examples.

    One and its mirror image take as many FLOPs, which are counted once.

    Args:
        flops_of: (size, examples) → those of a step.
    """
    found: dict[tuple[int, ...], float | None] = {}
    for size, count in sizes.items():
        if (sides := tuple(sorted(size))) not in found:
            found[sides] = ideal_seconds(partial(flops_of, size, count), devices)
    known = {size: ideal for size in sizes if (ideal := found[tuple(sorted(size))]) is not None}
    return known if len(known) == len(sizes) else None


def _log_memory(devices: Sequence[Any]) -> None:
    """The most that a device has used so far, where devices report it."""
    used = [stats for device in devices if (stats := device.memory_stats())]
    if not used:
        return
    most = max(used, key=lambda stats: stats.get("peak_bytes_in_use", 0))
    peak, limit = most.get("peak_bytes_in_use", 0) / 2**30, most.get("bytes_limit", 0) / 2**30
    _log.info("memory: at most %.2f of %.2f GiB on each of %d devices of this process", peak, limit, len(used))


class Profile:
    """A trace of the steps from `first` to `last`, both included, in `workdir/profile`; it is shown by xprof.

    Without `steps` there is none. A run that resumes at step `begin` traces those that are still to come.
    """

    def __init__(self, workdir: epath.PathLike, steps: Sequence[int], begin: int = 1):
        self._folder = epath.Path(workdir) / "profile"
        first, self._last = steps or (0, -1)
        self._first = max(first, begin)
        self._reached = 0
        self._local: tempfile.TemporaryDirectory[str] | None = None
        if steps and begin > self._last:
            _log.warning("train.profile_steps = %s: nothing is traced, for the run resumes at step %d", steps, begin)

    def before(self, step: int) -> None:
        """Starts the trace, where this step is in it."""
        if not self._first <= step <= self._last:
            return
        if self._local is None:
            self._local = tempfile.TemporaryDirectory(prefix=temporary_prefix("profile"))
            jax.profiler.start_trace(self._local.name)
        self._reached = step

    def after(self, step: int, state: PyTree) -> None:
        """Ends and writes the trace, where this step is the last of it."""
        if self._local is not None and step == self._last:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Writes what there is of a trace."""
        if self._local is None:
            return
        jax.profiler.stop_trace()
        with self._local as local:
            for file in (file for file in Path(local).rglob("*") if file.is_file()):  # jax writes local files alone
                target = self._folder / file.relative_to(local).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
        self._local = None
        _log.info("steps %d to %d are traced in %s; see it with xprof", self._first, self._reached, self._folder)
