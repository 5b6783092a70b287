"""Of several processes that make their steps together, the one that keeps the others waiting is named."""

import json
import logging
import pathlib
from dataclasses import asdict

import pytest

from offsetjax.parallel import processes
from offsetjax.training.goodput import Goodput
from offsetjax.training.metrics import StepClock
from offsetjax.training.pace import Pace, Paces, slow_one, summary


def _paces(data: list[float], own: list[float]) -> list[Pace]:
    return [Pace(index, f"host-{index}", *each) for index, each in enumerate(zip(data, own, strict=True))]


@pytest.mark.parametrize(
    ("data", "own", "slow"),
    [
        ([0.01, 0.02, 0.6, 0.01], [0.01] * 4, (2, "data")),
        ([0.01, 0.02, 0.01, 0.01], [0.01, 0.3, 0.02, 0.01], (1, "own")),
        ([0.0, 0.2], [0.0, 0.0], (1, "data")),
        ([0.3, 0.2], [0.5, 0.0], (0, "own")),  # the larger excess
        ([0.01, 0.02, 0.08, 0.01], [0.01] * 4, None),  # a factor, but no tenth of a step
        ([0.5, 0.6, 0.7, 0.8], [0.3] * 4, None),  # a tenth of a step, but no factor: they wait alike
    ],
)
def test_the_slow_one_is_twice_the_median_of_the_others(
    data: list[float], own: list[float], slow: tuple[int, str] | None
) -> None:
    found = slow_one(_paces(data, own), step_seconds=1.0)
    assert (found and (found[0].process, found[1])) == slow


def test_the_log_names_the_process_and_its_host_and_is_no_flood(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(processes, "are_several", lambda: True)
    store = [json.dumps(asdict(pace)) for pace in _paces([0, 0.01, 0.6], [0, 0.02, 0.03])]
    paces = Paces(publish=lambda key, mine: [mine, *store[1:]])
    with caplog.at_level(logging.WARNING):
        found = [paces.compare(0.02, 0.01, 1.0) for _ in range(9)][-1]
    assert found == {
        "data_wait_seconds_median": 0.02,
        "data_wait_seconds_most": 0.6,
        "own_seconds_median": 0.02,
        "own_seconds_most": 0.03,
        "slowest_process": 2,
    }
    assert [each.message for each in caplog.records] == [
        "process 2 (host-2) is slow: it waits for its data for 0.600 s of each step, the median of the others is "
        "0.015 s"
    ] * 4  # the 1st, 2nd, 4th and 8th time


def test_one_that_has_not_published_yet_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "are_several", lambda: True)
    assert Paces(publish=lambda key, mine: [mine]).compare(0.1, 0.1, 1.0) == {}
    monkeypatch.undo()
    assert Paces(publish=lambda key, mine: [mine] * 2).compare(0.1, 0.1, 1.0) == {}  # a process that trains alone


def test_the_clock_tells_own_work_from_waiting(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    now, told = [0.0], []
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(Paces, "compare", lambda self, *seconds: told.append(seconds) or {"slowest_process": 0})
    clock = StepClock(0, 8, Goodput(tmp_path, clock=lambda: now[0]))
    now[0] += 60  # it compiles
    assert "slowest_process" not in clock.lap(1)
    for _ in range(2):
        with clock.waiting_for_data():
            now[0] += 1
        with clock.waiting():
            now[0] += 4
        now[0] += 0.5
    assert clock.lap(3)["slowest_process"] == 0
    assert told == [(1, 0.5, 5.5)]


def test_the_summary_takes_both_together() -> None:
    assert summary(_paces([0.3, 0.2, 0.0], [0.0, 0.2, 0.35]))["slowest_process"] == 1
