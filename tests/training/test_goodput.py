"""Every second of a run is of one kind, over kills and resumes, and they add up to the wall clock."""

import json
import pathlib
import time

import pytest

from offsetjax.training.goodput import KINDS, Goodput, in_words, read_goodput
from tests.tiny import trained_workdir


class _Time:
    """A clock that is set forward by hand."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds

    def pass_by(self, seconds: float) -> None:
        self.seconds += seconds


def _started(workdir: pathlib.Path, clock: _Time, step: int) -> Goodput:
    goodput = Goodput(workdir, clock, clock)
    clock.pass_by(10)
    goodput.resumed(step)
    return goodput


def _steps(goodput: Goodput, clock: _Time, count: int) -> None:
    for _ in range(count):
        with goodput.spent_on("data"):
            clock.pass_by(0.25)
        clock.pass_by(1)


def test_kills_and_resumes_lose_what_is_trained_again_and_no_second_is_missing(tmp_path: pathlib.Path) -> None:
    clock = _Time()
    first = _started(tmp_path, clock, 0)
    _steps(first, clock, 4)
    with first.spent_on("checkpoint"):
        clock.pass_by(2)
    first.saved(4)
    _steps(first, clock, 3)
    first.write()  # as with a log line; then it is killed
    clock.pass_by(30)
    second = _started(tmp_path, clock, 4)
    with second.spent_on("evaluation"):
        clock.pass_by(5)
    _steps(second, clock, 6)
    second.saved(10)
    expected = {
        "start": 20,
        "compile": 0,
        "step": 4 + 6,
        "data": 1 + 1.5,
        "checkpoint": 2,
        "evaluation": 5,
        "idle": 30,
        "lost": 3.75,
    }
    assert read_goodput(tmp_path) == pytest.approx(expected)
    assert second.totals() == pytest.approx(expected)
    assert sum(expected.values()) == clock.seconds - 1000
    assert second.share() == pytest.approx(10 / sum(expected.values()))
    clock.pass_by(20)
    third = _started(tmp_path, clock, 4)  # an older step, as when the newest cannot be read: all of the second is lost
    third.write()
    found = read_goodput(tmp_path)
    assert found["lost"] == pytest.approx(3.75 + 10 + 5 + 7.5)
    assert found["step"] == 4
    assert sum(found.values()) == pytest.approx(clock.seconds - 1000)


def test_the_file_stays_small_over_many_starts_and_loses_no_second(tmp_path: pathlib.Path) -> None:
    clock, step = _Time(), 0
    for _ in range(20):
        goodput = _started(tmp_path, clock, step)
        for _ in range(8):
            step += 1
            _steps(goodput, clock, 1)
            goodput.saved(step)
        clock.pass_by(30)
    assert sum(read_goodput(tmp_path).values()) == pytest.approx(clock.seconds - 1000 - 30)
    assert read_goodput(tmp_path)["step"] == pytest.approx(20 * 8)
    assert (tmp_path / "goodput.json").stat().st_size < 20_000


def test_a_changed_number_is_reported_and_not_believed(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    goodput = _started(tmp_path, _Time(), 0)
    goodput.saved(4)
    file = tmp_path / "goodput.json"
    assert read_goodput(tmp_path)["start"] == 10 and not caplog.records
    file.write_text(file.read_text().replace('"start": 10.0', '"start": 90.0'))
    assert read_goodput(tmp_path) == {}
    assert "goodput.json cannot be read (its digest is not the one that was written)" in caplog.text


@pytest.mark.parametrize("content", [b"", b"{}", b"[[[", b'{"starts": 5}', b'{"starts": [{"began": null}]}', b"\xff"])
def test_a_file_that_is_none_is_of_no_start(tmp_path: pathlib.Path, content: bytes) -> None:
    (tmp_path / "goodput.json").write_bytes(content)
    assert read_goodput(tmp_path) == {}
    Goodput(tmp_path).resumed(5)


def test_a_place_that_cannot_be_written_to_ends_nothing(tmp_path: pathlib.Path) -> None:
    (tmp_path / "run").touch()
    goodput = Goodput(tmp_path / "run")
    goodput.resumed(0)
    goodput.saved(1)


def test_it_takes_less_than_half_a_percent_of_a_short_step(tmp_path: pathlib.Path) -> None:
    goodput = Goodput(tmp_path)
    begin = time.process_time()
    for _ in range(10_000):
        with goodput.spent_on("data"):
            pass
    assert (time.process_time() - begin) / 10_000 < 0.005 * 0.01  # of a step of 10 ms


def test_a_real_run_accounts_for_its_wall_clock(tmp_path_factory: pytest.TempPathFactory) -> None:
    workdir = trained_workdir(tmp_path_factory.getbasetemp())
    found = read_goodput(workdir)
    assert found.keys() == set(KINDS)
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert sum(found.values()) >= last["time_seconds"]
    assert (found["idle"], found["lost"]) == (0, 0)
    assert all(found[kind] > 0 for kind in ("start", "compile", "step", "data", "checkpoint", "evaluation"))
    assert 0 < last["goodput"] < 1
    assert in_words(found).startswith(f"{sum(found.values()):.0f} s in all: ")
