"""A run that only skips steps goes back once, leaves out the batches that hurt, and does the same when interrupted."""

import json
import logging
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import pytest

import offsetjax.train
from offsetjax.data.stream import Stream
from offsetjax.errors import UserError
from offsetjax.models.task import task_of
from offsetjax.storage import checkpoint
from offsetjax.storage.checkpoint import UnreadableError
from offsetjax.storage.saving import Saver
from offsetjax.training import placed, rollback
from offsetjax.training.goodput import Goodput, read_goodput
from offsetjax.training.rollback import RollBack
from tests.tiny import data_path, quick_compilation, tiny_config

HURT = {5, 6, 7}  # batches, of the steps 6, 7 and 8; step 9 finds that it is over, and step 4 is saved
BACK = RollBack(to=4, left_out=5)


class _Stream:
    """Batches that are their numbers."""

    parts = 1

    def __init__(self) -> None:
        self.open = 0

    def iterator(self, start: int) -> Iterator[int]:
        self.open += 1
        try:
            while True:
                yield start
                start += 1
        finally:
            self.open -= 1


@pytest.mark.parametrize(("start", "numbers"), [(0, [0, 1, 2, 3, 9, 10]), (3, [3, 9, 10]), (4, [9, 10]), (5, [10, 11])])
def test_each_step_takes_its_batch_wherever_a_start_begins(start: int, numbers: list[int]) -> None:
    stream = _Stream()
    batches = BACK.batches(stream, start)  # type: ignore[arg-type]
    assert [next(batches) for _ in numbers] == numbers
    assert [BACK.batch_of(start + 1 + place) for place in range(len(numbers))] == numbers
    assert stream.open == 1
    batches.close()
    assert stream.open == 0
    assert [RollBack().batch_of(step) for step in (1, 2, 3)] == [0, 1, 2]


def test_it_goes_back_to_the_newest_checkpoint_of_before() -> None:
    assert rollback.before([2, 4, 6, 8], first_skipped=6, last=9) == BACK
    assert rollback.before([2, 4, 5], first_skipped=6, last=9) == RollBack(5, 4)
    assert not rollback.before([6, 8], first_skipped=6, last=9), "what was saved since is no better"
    assert not rollback.before([], first_skipped=1, last=4)


def test_what_was_saved_of_undone_steps_is_not_resumed(tmp_path: pathlib.Path) -> None:
    assert rollback.read(tmp_path) == RollBack()
    rollback.write(tmp_path, BACK)
    assert rollback.read(tmp_path) == BACK
    for step, data in ((4, {}), (6, BACK.noted(6)), (2, BACK.noted(2))):
        BACK.check(step, data)
    for step, data in ((6, {}), (5, {"rolled_back": {"to": 4, "left_out": 6}})):
        with pytest.raises(UnreadableError, match=f"step {step} was undone: the run went back to step 4"):
            BACK.check(step, data)
    RollBack().check(6, {})


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"to": 4}', b'{"to": 4, "left_out": 0}', b'{"to": "4", "left_out": 5}']
)
def test_a_damaged_note_is_one_line_and_no_other_order_of_the_data(content: bytes, tmp_path: pathlib.Path) -> None:
    (tmp_path / "rolled_back.json").write_bytes(content)
    with pytest.raises(UserError, match=r"rolled_back\.json is damaged; restore it from a copy"):
        rollback.read(tmp_path)


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., dict[int, Any]]]:
    """Trains 12 steps, of which the batches `hurt` give no number; the losses by step."""
    hurting = set(HURT)
    iterator = Stream.iterator

    def marked(stream: Stream, start: int = 0) -> Iterator[dict[str, Any]]:
        for number, batch in enumerate(iterator(stream, start), start):
            yield {**batch, "is_truncated": batch["is_truncated"] | (number in hurting)}

    def make(pipeline: Any, config: Any) -> Any:
        objective = task_of(config).objective(pipeline, config)

        def hurt(params: Any, frozen: Any, batch: Any, step: Any) -> Any:
            return jnp.where(batch["is_truncated"], jnp.nan, objective(params, frozen, batch, step))

        return hurt

    monkeypatch.setattr(Stream, "iterator", marked)
    monkeypatch.setattr(placed, "task_of", lambda config: replace(task_of(config), objective=make))
    base = tmp_path_factory.getbasetemp()

    def train(workdir: pathlib.Path, *more: int, **changes: Any) -> dict[int, Any]:
        hurting.update(more)
        settings = {"train__steps": 12, "train__max_skipped_in_a_row": 3, "train__roll_back": True}
        offsetjax.train.train(tiny_config(data_path(base), **{**settings, **changes}), workdir)
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        assert len({line["step"] for line in lines}) == len(lines)
        return {line["step"]: (line["loss"], line["grad_norm"], line["skipped"]) for line in lines}

    with quick_compilation(base):
        yield train


def _saved(workdir: pathlib.Path, step: int) -> Any:
    with checkpoint.open_checkpoints(workdir) as manager:
        return checkpoint.read_data(manager, step)


def test_a_run_goes_back_once_and_the_next_time_it_ends(
    run: Callable[..., dict[int, Any]], tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(UserError) as error:
        run(tmp_path, 13, 14, 15, train__steps=40)  # batches of the steps 9, 10 and 11, once it went back
    assert "steps 9 to 11 changed nothing" in str(error.value)
    assert "it went back once, to step 4; what was trained is saved as step 12" in str(error.value)
    [told] = [each.message for each in caplog.records if "goes back" in each.message]
    assert told.startswith("steps 6 to 8 changed nothing (train.max_skipped_in_a_row = 3); the last: loss nan")
    assert told.endswith("; the run goes back to step 4, and reads on")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    skipped = {line["step"]: line["skipped"] for line in lines}
    assert len(lines) == 12 and skipped == {step: min(max(0, step - 8), 3) for step in range(1, 13)}
    assert rollback.read(tmp_path) == BACK
    assert _saved(tmp_path, 12)["rolled_back"] == {"to": 4, "left_out": 5}
    assert {path.name.partition("_")[0] for path in (tmp_path / "unreadable").iterdir()} == {"6", "8"}
    assert read_goodput(tmp_path)["lost"] > 0


@pytest.mark.chaos
def test_an_interrupted_run_goes_back_as_one_that_was_not(
    run: Callable[..., dict[int, Any]], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    whole, workdir = run(tmp_path / "whole"), tmp_path / "run"
    is_due = Saver.is_due

    def at_step_7(saver: Saver, step: int) -> bool:
        return killed() if step == 7 else is_due(saver, step)

    moments = [
        (Saver, "is_due", at_step_7),  # among the steps that will be undone; the next start resumes at 6, one of them
        (Goodput, "begins_again", killed),  # it is noted, and nothing else was done
        (Saver, "is_due", at_step_7),  # after it went back: the next start resumes at the new step 6
    ]
    for owner, name, act in moments:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, act)
            with pytest.raises(KeyboardInterrupt):
                run(workdir)
    assert list(whole) == list(range(1, 13)) and not any(skipped for *_, skipped in whole.values())
    assert run(workdir) == whole
    assert _saved(workdir, 12)["checksums"] == _saved(tmp_path / "whole", 12)["checksums"]
    assert rollback.read(workdir) == BACK
