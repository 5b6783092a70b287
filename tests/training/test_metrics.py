"""The record of a training: a line a step, once, whatever happened in between."""

import json
import pathlib
import struct
import time
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from tensorboardX.proto.event_pb2 import Event

from offsetjax.training.metrics import MetricsWriter, StepClock, format_duration

VALUES = {"loss": 0.1, "images_per_second": 8.0}


def read_events(workdir: pathlib.Path) -> Iterator[tuple[int, str, float]]:
    """(step, name, value) of every scalar, by TensorBoard's record format: length, its checksum, data, its checksum."""
    for file in sorted(workdir.glob("events.out.tfevents.*")):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            yield from ((event.step, value.tag, value.simple_value) for value in event.summary.value)
            at += 16 + length


def _write(workdir: pathlib.Path, start: int, steps: tuple[int, ...], **more: Any) -> None:
    writer = MetricsWriter(workdir, start, 10)
    for step in steps:
        writer.write(step, {**VALUES, **more})
    writer.close()


def _lines(workdir: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_line_and_scalars_for_each_step(tmp_path: pathlib.Path) -> None:
    third = 1 / 3
    _write(tmp_path, 0, (1, 2), loss=third)
    assert [(line["step"], line["loss"].hex()) for line in _lines(tmp_path)] == [(1, third.hex()), (2, third.hex())]
    assert [(step, value) for step, name, value in read_events(tmp_path) if name == "loss"] == [
        (1, pytest.approx(third)),
        (2, pytest.approx(third)),
    ]


def test_a_resumed_run_writes_again_what_came_after_its_checkpoint(tmp_path: pathlib.Path) -> None:
    _write(tmp_path, 0, (1, 2, 3), loss=1.0)
    before = _lines(tmp_path)
    _write(tmp_path, 2, (3, 4), loss=2.0)
    lines = _lines(tmp_path)
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]
    assert lines[:2] == before[:2]
    times = [line["time_seconds"] for line in lines]
    assert times == sorted(times)


def test_a_run_begun_anew_starts_an_empty_record(tmp_path: pathlib.Path) -> None:
    _write(tmp_path, 0, (1, 2))
    _write(tmp_path, 0, (1,))
    assert [line["step"] for line in _lines(tmp_path)] == [1]


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3}', "\x00\x00\x00\n", '{"loss"\n'])
def test_a_torn_line_is_dropped(tmp_path: pathlib.Path, torn: str) -> None:
    _write(tmp_path, 0, (1, 2))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    _write(tmp_path, 2, (3,))
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 3]


def test_of_several_processes_the_first_writes(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, 0, (1, 2))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    _write(tmp_path, 0, (1, 2, 3))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_values_that_are_not_finite_are_written(tmp_path: pathlib.Path) -> None:
    _write(tmp_path, 0, (1,), loss=float("nan"))
    _write(tmp_path, 1, (2,))
    assert _lines(tmp_path)[0]["loss"] != _lines(tmp_path)[0]["loss"]


def test_the_clock_counts_waiting_and_leaves_pauses_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = StepClock(start_step=10, global_batch_size=8)
    with clock.waiting_for_data():
        now[0] += 1.0
    now[0] += 3.0
    with clock.paused():
        now[0] += 50.0
    assert clock.lap(12) == {"images_per_second": 4.0, "step_seconds": 2.0, "data_wait_seconds": 0.5}
    now[0] += 0.5
    assert clock.lap(13) == {"images_per_second": 16.0, "step_seconds": 0.5, "data_wait_seconds": 0.0}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (75, "1:15"), (59.6, "1:00"), (3599.7, "1:00:00"), (3675, "1:01:15")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
