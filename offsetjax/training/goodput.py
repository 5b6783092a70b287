"""What the seconds of a run were spent on, over all of its starts: `goodput.json` in the work directory.

Every second of a start is of one kind, that which was begun last; what lies between two starts is idle. Seconds after
the checkpoint that the next start resumes from are lost, whatever they were spent on: their steps are trained again. So
the kinds add up to the wall clock from the first start on.
"""

import contextlib
import itertools
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath

from offsetjax.errors import one_line
from offsetjax.files import write_whole
from offsetjax.json_text import is_damaged, parse_object, signed
from offsetjax.storage.retry import retried

_log = logging.getLogger("offsetjax")
_FILE = "goodput.json"
KINDS = ("start", "compile", "step", "data", "checkpoint", "evaluation", "idle", "lost")
_COMPILATION = ("/jax/core/compile/backend_compile_duration", "/jax/core/compile/jaxpr_to_mlir_module_duration")
_WRITTEN_EVERY = 5.0  # seconds
_MARKS, _FEW_MARKS = (
    32,
    4,
)  # saved steps of the last start that are kept, and of each before; a resume takes a newer one

Start = dict[str, Any]  # began: seconds since 1970; seconds by kind; marks: seconds by kind, by saved step


class Goodput:
    """Counts the seconds of this start, in the thread that makes it; the first of several processes writes them.

    Args:
        clock: seconds that only rise.
        now: seconds since 1970, which count between starts.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._file, self._clock = epath.Path(workdir) / _FILE, clock
        self._thread, self._kind, self._at, self._written = threading.get_ident(), "start", clock(), 0.0
        self._starts: list[Start] = []
        self._now = now
        self._mine = self._new()

    def _new(self) -> Start:
        return {"began": self._now(), "seconds": dict.fromkeys(KINDS, 0.0), "marks": {}}

    def __enter__(self) -> "Goodput":
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        return self

    def __exit__(self, *_: Any) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_duration)

    def resumed(self, step: int) -> None:
        """To be called once, before the first step: steps after this one, of starts before, are lost."""
        starts = [_cut(start, step) for start in _read(self._file)]
        self._starts = [*map(_with_few_marks, starts[:-1]), *starts[-1:]]
        self._turn("step")

    def begins_again(self) -> None:
        """Of a run that goes back to a step by itself: what comes now counts as another start."""
        self.write()
        self._mine, self._kind = self._new(), "start"

    @contextlib.contextmanager
    def spent_on(self, kind: str) -> Iterator[None]:
        """The time inside is of a kind."""
        before = self._turn(kind)
        try:
            yield
        finally:
            self._turn(before)

    def saved(self, step: int) -> None:
        """To be called once a step is saved: what comes after may be lost."""
        self._turn(self._kind)
        marks = {**self._mine["marks"], str(step): dict(self._mine["seconds"])}
        self._mine["marks"] = dict(list(marks.items())[-_MARKS:])
        self.write()

    def totals(self) -> dict[str, float]:
        """The seconds by kind, over all starts up to now."""
        self._turn(self._kind)
        return totals([*self._starts, self._mine])

    def share(self) -> float:
        """The share of all seconds that were steps whose result was kept."""
        found = self.totals()
        return found["step"] / max(sum(found.values()), 1e-9)

    def write(self, is_last: bool = True) -> None:
        """Writes the file; where it is not the last time, only every few seconds. A place that fails ends no run."""
        now = self._clock()
        if jax.process_index() != 0 or not (is_last or now - self._written > _WRITTEN_EVERY):
            return
        self._written = now
        self._turn(self._kind)
        if not self._file.parent.exists():  # a run that was deleted must not be there again
            return
        try:
            write_whole(self._file, json.dumps(signed({"starts": [*self._starts, self._mine]})) + "\n")
        except Exception as error:  # a full disk or a bucket that is away: what a checkpoint needs says so
            _log.debug("%s: %s", self._file, one_line(error))

    def _turn(self, kind: str) -> str:
        now, before = self._clock(), self._kind
        self._mine["seconds"][before] += now - self._at
        self._kind, self._at = kind, now
        return before

    def _on_duration(self, event: str, duration_secs: float, **_: Any) -> None:
        if event in _COMPILATION and threading.get_ident() == self._thread and self._kind != "start":
            self._turn(self._kind)
            seconds = self._mine["seconds"]
            moved = min(duration_secs, seconds[self._kind])
            seconds[self._kind] -= moved
            seconds["compile"] += moved


def totals(starts: list[Start]) -> dict[str, float]:
    """The seconds of starts by kind, with those between them."""
    found = {kind: sum(start["seconds"][kind] for start in starts) for kind in KINDS}
    for one, other in itertools.pairwise(starts):
        found["idle"] += max(0.0, other["began"] - one["began"] - sum(one["seconds"].values()))
    return found


def read_goodput(workdir: epath.PathLike) -> dict[str, float]:
    """The seconds of a run by kind, as of when it last wrote them; empty where it did not."""
    starts = _read(epath.Path(workdir) / _FILE)
    return totals(starts) if starts else {}


def in_words(seconds: Mapping[str, float]) -> str:
    """`120 s in all: step 80.0 %, compile 15.0 %, start 5.0 %`, the largest first."""
    total = sum(seconds.values())
    shares = sorted(((value, kind) for kind, value in seconds.items() if value > 0), reverse=True)
    return f"{total:.0f} s in all: " + ", ".join(f"{kind} {value / total:.1%}" for value, kind in shares)


def _cut(start: Start, step: int) -> Start:
    """A start before, of which a later one resumes after `step`."""
    marks = {saved: mark for saved, mark in start["marks"].items() if int(saved) <= step}
    kept = marks[max(marks, key=int)] if marks else dict.fromkeys(KINDS, 0.0)
    lost = sum(start["seconds"].values()) - sum(kept.values())
    return {**start, "marks": marks, "seconds": {**kept, "lost": kept["lost"] + lost}}


def _with_few_marks(start: Start) -> Start:
    """A start that is followed by two others: the file stays small over hundreds of preemptions."""
    return {**start, "marks": dict(list(start["marks"].items())[-_FEW_MARKS:])}


def _read(file: epath.Path) -> list[Start]:
    """The starts of a file; none where there is none or, with a warning, where it is damaged: no training needs it."""
    try:
        stored = parse_object(retried(file.read_bytes, str(file)))
        if is_damaged(stored):
            raise ValueError("its digest is not the one that was written")
        return [_checked(start) for start in stored["starts"]]
    except FileNotFoundError:
        return []
    except Exception as error:  # damaged, or a bucket that is away, of which each library has its own kind
        _log.warning("%s cannot be read (%s): what the time was spent on so far is not known", file, one_line(error))
        return []


def _checked(start: Any) -> Start:
    def seconds(found: Any) -> dict[str, float]:
        return {kind: float(found[kind]) for kind in KINDS}

    marks = {str(int(step)): seconds(mark) for step, mark in start["marks"].items()}
    return {"began": float(start["began"]), "seconds": seconds(start["seconds"]), "marks": marks}
