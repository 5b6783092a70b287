"""What each of several processes needs of a step for itself, and which of them keeps the others waiting.

Processes that train as one make their steps together, so that the steps of all take as long as the slowest one's. What
tells it apart is what it does meanwhile: it waits for its data, or works between two steps, where the others wait for
their devices. At each log every process publishes both, and the first compares what each published last: nobody waits
for another. A device that is slow keeps all of them waiting alike, and is not told apart by this.
"""

import itertools
import json
import logging
import socket
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import jax

from offsetjax.json_text import parse_object
from offsetjax.parallel import processes

_log = logging.getLogger("offsetjax")
_FACTOR, _SHARE = 2.0, 0.1  # a slow one needs twice the median of the others, and a tenth of a step more than that
_trainings = itertools.count()  # of this program: each has a key of its own, the same in all processes


@dataclass(frozen=True)
class Pace:
    """Seconds of a step, by what a process spent them on.

    Attributes:
        data: waiting for its data.
        own: its own work between two steps: neither data, nor devices, nor storage are waited for.
    """

    process: int
    host: str
    data: float
    own: float


class Paces:
    """Compares the processes of one training.

    Args:
        publish: gives a text of this process's, and what each has given last.
    """

    def __init__(self, publish: Callable[[str, str], Sequence[str]] = processes.publish) -> None:
        self._publish, self._key = publish, f"offsetjax/paces/{next(_trainings)}"
        self._times = Counter[tuple[int, str]]()

    def compare(self, data: float, own: float, step_seconds: float) -> dict[str, float]:
        """What is logged of all processes; nothing where there is one, or on another than the first.

        Args:
            data, own: of this process, see `Pace`.
            step_seconds: of a whole step.
        """
        if not processes.are_several():
            return {}
        mine = Pace(jax.process_index(), socket.gethostname(), round(data, 5), round(own, 5))
        try:
            paces = [Pace(**parse_object(text)) for text in self._publish(self._key, json.dumps(asdict(mine)))]
        except jax.errors.JaxRuntimeError:  # the store is busy, or gone: what ends the training is said elsewhere
            return {}
        if not processes.is_first() or len(paces) < 2:
            return {}
        if slow := slow_one(paces, step_seconds):
            self._warn(*slow, paces)
        return summary(paces)

    def _warn(self, pace: Pace, measure: str, paces: Sequence[Pace]) -> None:
        self._times[pace.process, measure] += 1
        times = self._times[pace.process, measure]
        if times & (times - 1) == 0:  # the 1st, 2nd, 4th, 8th …: at once, and never a flood
            what = {"data": "waits for its data", "own": "works between two steps"}[measure]
            _log.warning(
                "process %d (%s) is slow: it %s for %.3f s of each step, the median of the others is %.3f s",
                *(pace.process, pace.host, what, getattr(pace, measure), _median_of_others(paces, pace, measure)),
            )


def slow_one(paces: Sequence[Pace], step_seconds: float) -> tuple[Pace, str] | None:
    """The process that is slower than the others by a clear factor, and in what; the worst, where there are several."""
    found = []
    for measure in ("data", "own"):
        for pace in paces:
            value, median = getattr(pace, measure), _median_of_others(paces, pace, measure)
            if value > _FACTOR * median and value - median > _SHARE * step_seconds:
                found.append((value - median, pace, measure))
    return max(found, key=lambda each: each[0])[1:] if found else None


def summary(paces: Sequence[Pace]) -> dict[str, float]:
    """The median and the most of each measure, and the process that needs the most in all."""
    values: dict[str, float] = {}
    for measure, name in (("data", "data_wait_seconds"), ("own", "own_seconds")):
        each = [getattr(pace, measure) for pace in paces]
        values |= {f"{name}_median": statistics.median(each), f"{name}_most": max(each)}
    return {**values, "slowest_process": max(paces, key=lambda pace: pace.data + pace.own).process}


def _median_of_others(paces: Sequence[Pace], pace: Pace, measure: str) -> float:
    return statistics.median(getattr(each, measure) for each in paces if each is not pace)
