"""The record of a training: a line a step, once, whatever happened in between."""

import io
import json
import math
import pathlib
import resource
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from offsetjax.files import write_whole
from offsetjax.sampling.pictures import Picture
from offsetjax.training import jsonl
from offsetjax.training.goodput import Goodput
from offsetjax.training.jsonl import JsonLines, read_log
from offsetjax.training.metrics import Metrics, StepClock, open_metrics
from offsetjax.training.writers import format_duration

ALL = ("jsonl", "tensorboard", "terminal")
VALUES = {"loss": 0.1, "images_per_second": 8.0}


def _events(workdir: pathlib.Path) -> Iterator[tuple[Event, Any]]:
    """Every value of every event, by TensorBoard's record format: length, its checksum, data, its checksum."""
    for file in sorted(workdir.glob("events.out.tfevents.*")):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            yield from ((event, value) for value in event.summary.value)
            at += 16 + length


def read_events(workdir: pathlib.Path) -> Iterator[tuple[int, str, float]]:
    """(step, name, value) of every scalar of TensorBoard's."""
    for event, value in _events(workdir):
        if not value.HasField("image"):
            yield event.step, value.tag, value.simple_value


def _write(workdir: pathlib.Path, start: int, steps: tuple[int, ...], **more: Any) -> None:
    writer = open_metrics(ALL, workdir, start, 10)
    for step in steps:
        writer.scalars(step, {**VALUES, **more})
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


def test_a_torn_line_of_a_later_step_is_written_again(tmp_path: pathlib.Path) -> None:
    _write(tmp_path, 0, (1, 2))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3}')
    _write(tmp_path, 2, (3,))
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 3]


def test_of_several_processes_the_first_writes(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, 0, (1, 2))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    _write(tmp_path, 0, (1, 2, 3))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_valid_json_and_read_back(tmp_path: pathlib.Path, value: float) -> None:
    _write(tmp_path, 0, (1,), loss=value)
    _write(tmp_path, 1, (2,))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    np.testing.assert_equal([line.values["loss"] for line in read_log(tmp_path).lines], [value, 0.1])


DAMAGED = (
    b'{"step": 1, "lo\xffss": 0.1}\n',  # a bit flipped: no UTF-8
    b'{"step": null}\n',
    b'{"step": 1.5}\n',
    b'{"step": true}\n',
    b"[" * 200_000 + b"\n",
    b'{"loss": 1.0}\n',
    b'{"step": 1, "loss": "high"}\n',
    b'{"step": 1, "loss": 1' + b"0" * 5000 + b"}\n",
    b"\x00\x00\x00\n",
    b'{"step": 2, "lo',
)


@pytest.mark.parametrize("damaged", DAMAGED)
def test_a_resume_sets_lines_aside_that_cannot_be_read(
    tmp_path: pathlib.Path, damaged: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    _write(tmp_path, 0, (1, 2))
    file = tmp_path / "metrics.jsonl"
    first, second = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(first + second + damaged if damaged[-1:] != b"\n" else first + damaged + second)
    _write(tmp_path, 2, (3,))
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 3]
    assert (tmp_path / "metrics.unreadable").read_bytes() == damaged.rstrip(b"\n") + b"\n"
    [warning] = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert "1 lines of the training's record cannot be read" in warning and "metrics.unreadable" in warning
    _write(tmp_path, 3, (4,))  # and once only
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("last", [{"step": 2, "loss": 1.0}, {"step": 2, "time_seconds": "NaN"}])
def test_a_line_without_a_time_is_kept(tmp_path: pathlib.Path, last: dict[str, Any]) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time_seconds": 7.0}\n' + json.dumps(last) + "\n")
    _write(tmp_path, 2, (3,))
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 3] and _lines(tmp_path)[2]["time_seconds"] >= 7.0


class _Failing:
    """A service that is down when it is opened, and again later."""

    calls: ClassVar[list[str]] = []

    def __init__(self, workdir: epath.Path, start_step: int, num_steps: int):
        self.calls.append(f"open {start_step}")
        if len(self.calls) == 1:
            raise ConnectionError("no route to\nhost")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.calls.append(f"step {step}")
        if step == 2:
            raise ConnectionError("gone again")

    def images(self, step: int, name: str, pictures: Sequence[Picture], about: Mapping[str, Any]) -> None:
        self.calls.append(name)

    def close(self) -> None:
        raise ConnectionError("at the end")


def test_a_writer_that_fails_is_named_once_and_opened_again_and_ends_nothing(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    workdir = epath.Path(tmp_path)
    metrics = Metrics({"service": lambda: _Failing(workdir, 0, 10), "jsonl": lambda: JsonLines(workdir, 0, 10)})
    for step in (1, 2, 3):
        metrics.scalars(step, VALUES)
    picture = Picture("a cat", 0, np.zeros((4, 4, 3), np.uint8))
    metrics.images(3, "step_3", [picture], {"step": 3})
    metrics.close()
    assert _Failing.calls == ["open 0", "open 0", "step 1", "step 2", "step 3", "step_3"]
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 3]
    assert json.loads((tmp_path / "samples" / "step_3.json").read_text())["records"][0]["prompt"] == "a cat"
    [warning] = [each.getMessage() for each in caplog.records]
    assert warning == "train.writers: service failed (no route to host); the training continues"


def test_a_full_disk_loses_no_line(tmp_path: pathlib.Path) -> None:
    writer = open_metrics(("jsonl",), tmp_path, 0, 10)
    writer.scalars(1, VALUES)
    whole = (tmp_path / "metrics.jsonl").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole + 10, before[1]))
    try:
        writer.scalars(2, VALUES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "metrics.jsonl").stat().st_size == whole + 10, "the beginning of a line is there"
    writer.scalars(3, VALUES)
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 3]


def test_on_an_object_store_the_record_is_in_parts(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "is_remote", lambda path: True)
    monkeypatch.setattr(jsonl, "_PART", 3)
    written = []

    def note(path: epath.Path, content: bytes) -> None:
        written.append((path.name, content.count(b"\n")))
        write_whole(path, content)

    monkeypatch.setattr(jsonl, "write_whole", note)
    writer = open_metrics(("jsonl",), tmp_path, 0, 10)
    for step in range(1, 8):
        writer.scalars(step, VALUES)
    assert written[1:] == [
        *[("metrics.jsonl", lines) for lines in (1, 2, 3)],
        *[("metrics.00001.jsonl", lines) for lines in (1, 2, 3)],
        ("metrics.00002.jsonl", 1),
    ]
    assert [line.step for line in read_log(tmp_path).lines] == list(range(1, 8))
    written.clear()
    writer = open_metrics(("jsonl",), tmp_path, 5, 10)
    writer.scalars(6, {**VALUES, "loss": 2.0})
    assert written == [("metrics.00001.jsonl", 2), ("metrics.00001.jsonl", 3)]
    steps = [(line.step, line.values["loss"]) for line in read_log(tmp_path).lines]
    assert steps == [*((step, 0.1) for step in range(1, 6)), (6, 2.0)]
    assert not (tmp_path / "metrics.00002.jsonl").exists()
    monkeypatch.setattr(jsonl, "is_remote", lambda path: False)
    open_metrics(("jsonl",), tmp_path, 4, 10)  # it was copied to a disk
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 3, 4]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_pictures_go_to_every_writer(tmp_path: pathlib.Path) -> None:
    writer = open_metrics(ALL, tmp_path, 0, 10)
    writer.images(5, "step_5", [Picture("a cat", 0, np.full((4, 4, 3), 255, np.uint8))], {"step": 5})
    writer.close()
    assert {file.name for file in (tmp_path / "samples").iterdir()} == {"step_5.png", "step_5.json"}
    images = [(event.step, value.tag, value.image) for event, value in _events(tmp_path) if value.HasField("image")]
    [(step, tag, image)] = images
    shown = Image.open(io.BytesIO(image.encoded_image_string))
    drawn = Image.open(io.BytesIO((tmp_path / "samples" / "step_5.png").read_bytes()))
    assert (step, tag, shown.size) == (5, "step", drawn.size)


def test_the_clock_counts_waiting_and_leaves_pauses_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = StepClock(10, 8, Goodput(tmp_path, clock=lambda: now[0]))
    with clock.waiting_for_data():
        now[0] += 1.0
    now[0] += 3.0
    with clock.paused():
        now[0] += 50.0
    rates = {"images_per_second": 4.0, "step_seconds": 2.0, "data_wait_seconds": 0.5}
    assert clock.lap(12) == {**rates, "goodput": 0.0}  # no step was asked for yet
    now[0] += 0.5
    assert clock.lap(13) == {"images_per_second": 16.0, "step_seconds": 0.5, "data_wait_seconds": 0.0, "goodput": 0.0}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (75, "1:15"), (59.6, "1:00"), (3599.7, "1:00:00"), (3675, "1:01:15")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_no_flipped_bit_of_a_record_is_silent(tmp_path: pathlib.Path) -> None:
    _write(tmp_path, 0, (1,))
    file = tmp_path / "metrics.jsonl"
    good, before = file.read_bytes(), read_log(tmp_path).lines
    for bit in range(8 * len(good)):
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        log = read_log(tmp_path)
        assert log.unreadable or log.torn or log.lines == before, bytes(flipped)
    older = good[: good.index(b', "crc"')] + b"}\n"  # as versions before wrote it
    file.write_bytes(older)
    assert [line.values for line in read_log(tmp_path).lines] == [line.values for line in before]
