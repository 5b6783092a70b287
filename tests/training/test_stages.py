"""Trainings in stages: each goes on where the one before has stopped, and a resume anywhere changes no bit."""

import contextlib
import json
import logging
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from offsetjax.data.source import open_source
from offsetjax.data.stream import Stream, make_stream
from offsetjax.errors import UserError
from offsetjax.models.trained import load_trained, open_stored, read_config, write_config
from offsetjax.train import train
from offsetjax.training import states
from offsetjax.training.check import check
from offsetjax.training.metrics import WRITERS
from offsetjax.training.optimizer import make_optimizer
from tests.compilation import quick_compilation
from tests.data.shapes import COUNT, pictures_of_shapes
from tests.data.test_sizes import buckets_of
from tests.processes import call_together
from tests.tiny import tiny_config

SMALL = "train.steps=3 data.resolution=8 train.global_batch_size=16 optimizer.learning_rate=2e-3"
LARGE = "train.steps=2 optimizer.warmup_steps=0"
SIZES = f"{LARGE} data.buckets=('16x16', '24x16')"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return pictures_of_shapes(tmp_path_factory.getbasetemp())


def staged(data: pathlib.Path | str, **changes: Any) -> Any:
    options = {"train__stages": (SMALL, LARGE), "train__steps": 5, "optimizer__decay": "linear"}
    return tiny_config(data, **{**options, "data__split": "train[:30]", **changes})


def lines(workdir: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def record(workdir: pathlib.Path) -> list[tuple[Any, ...]]:
    """What each step computed, in hex."""
    names = ("loss", "grad_norm", "learning_rate")
    found = [line for line in lines(workdir) if "loss" in line]
    return [(line["step"], line["stage"], *(float(line[name]).hex() for name in names)) for line in found]


def _stream(data: pathlib.Path, batch: int, has_sizes: bool = False) -> Stream:
    source = open_source(data)
    buckets = buckets_of(source, batch_size=batch) if has_sizes else None
    return make_stream(
        source,
        seed=3,
        global_batch_size=batch,
        resolution=16,
        random_flip=True,
        tokenize=lambda caption: ({"text": np.zeros(1)}, 1, 1),
        buckets=buckets,
    )


def test_a_stage_goes_on_in_the_data_where_the_one_before_has_stopped(data: pathlib.Path) -> None:
    first = _stream(data, 4)
    seen = [example for number in range(5) for example in first.examples_of(number)]
    second = _stream(data, 8).going_on_after(first.examples_before(5), number=5)
    seen += [example for number in range(5, 7) for example in second.examples_of(number)]
    # 20 examples, of which batches of 8 begin with the 25th; none of an epoch is seen twice.
    assert second.examples_before(5) == 24 and len(seen) == 36
    assert len(set(seen[:20] + seen[20:31])) == 31 <= COUNT
    whole = _stream(data, 8)
    assert second.examples_of(6) == whole.examples_of(4) and second.fingerprint()["shift"] == -2
    same = _stream(data, 4).going_on_after(first.examples_before(5), number=5)
    assert same.shift == 0 and same.fingerprint() == first.fingerprint()  # as a run that goes on


def test_a_stage_of_several_sizes_goes_on_too(data: pathlib.Path) -> None:
    plain = _stream(data, 3, has_sizes=True)
    for shown in (0, 1, 3, 20, 100, 1000):
        stream = plain.going_on_after(shown, number=7)
        assert stream.examples_before(7) >= shown > stream.examples_before(7) - 3
        assert stream.sizes_of(7) == plain.sizes_of(7 + stream.shift)
        batches = stream.iterator(9)
        assert next(batches)["index"].tolist() == stream.examples_of(9) == plain.examples_of(9 + stream.shift)
        batches.close()


@pytest.mark.parametrize("name", ["adamw", "text_encoders"])
def test_a_stage_has_its_own_warm_up_and_decay_and_the_moments_go_on(name: str) -> None:
    config = tiny_config(optimizer__decay="linear", optimizer__warmup_steps=2)
    config.optimizer.text_encoder_learning_rate = 1e-3 if name == "text_encoders" else 0.0
    params = {"unet": {"w": jnp.ones(3)}, "text_encoder": {"w": jnp.ones(3)}}
    whole, stage = (make_optimizer(config.optimizer, 6, ("text_encoder",), first=first) for first in (0, 10))
    assert [float(stage.learning_rate(count)) for count in range(8, 16)] == pytest.approx(
        [float(whole.learning_rate(max(0, count - 10))) for count in range(8, 16)]
    )
    gradient, state = jax.tree.map(lambda each: 0.1 * each, params), whole.transform.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(stage.transform.init(params))

    def counted(count: int) -> Any:
        def at(each: Any) -> Any:
            return each._replace(count=jnp.int32(count)) if isinstance(each, optax.ScaleByScheduleState) else each

        return jax.tree.map(at, state, is_leaf=lambda each: isinstance(each, optax.ScaleByScheduleState))

    for count in (8, 10, 13):  # 8: two updates were skipped in the stages before
        updates, after = stage.transform.update(gradient, counted(count), params)
        expected, _ = whole.transform.update(gradient, counted(max(0, count - 10)), params)
        jax.tree.map(np.testing.assert_array_equal, updates, expected)
        counts = optax.tree.get_all_with_path(after, "count")
        schedules = [int(value) for path, value in counts if "ScaleByScheduleState" in str(path)]
        assert schedules and set(schedules) == {count + 1}


def test_what_stops_a_stage_is_found_before_a_training_and_named(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    wrong, _, said = check(staged(data, train__stages=(SMALL, SIZES)), tmp_path / "run")
    text = "\n".join(said)
    assert not wrong and "stage 1 of 2, steps 1 to 3: data.resolution=8" in text and "steps: 2 of 8 examples" in text
    assert "sizes of stage 2:" in text and not list(tmp_path.iterdir())
    for stage, words in (
        ("train.steps=2 data.resolution=15", "stage 2: data.resolution = 15 must be a multiple of"),
        ("train.steps=2 data.buckets=('16x16', '8x128')", "stage 2: data: no picture of"),
        ("train.steps=2 train.global_batch_size=9", "stage 2: train.global_batch_size / train.accumulate_steps = 9"),
        ("train.steps=2 data.path=/no/such/data", "stage 2: "),
        ("train.steps=2 data.buckets=('16x16',) data.equal_tokens=3", "stage 2: data.equal_tokens = 3 must be"),
    ):
        wrong, _, said = check(staged(data, train__stages=(SMALL, stage)), tmp_path / "run")
        assert any(words in each for each in wrong) and not said, (stage, wrong)
        with pytest.raises(UserError, match=re.escape(words)):
            train(staged(data, train__stages=(SMALL, stage)), tmp_path / "run")


def test_a_training_in_stages(data: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """All programs are compiled before step 1; steps, rates and who opens the run know the stage."""
    with quick_compilation(tmp_path), caplog.at_level(logging.INFO, "offsetjax"):
        train(staged(data), tmp_path / "run")
    found = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert [(line["step"], line["stage"]) for line in found] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2)]
    assert [line["learning_rate"] for line in found] == pytest.approx([2e-3, 2e-3, 1e-3, 1e-3, 5e-4])
    said = [record.getMessage() for record in caplog.records]
    compiled = [place for place, line in enumerate(said) if line.startswith("the step for ")]
    begun = [place for place, line in enumerate(said) if re.match(r"from step \d on: stage", line)]
    assert len(compiled) == 2 and len(begun) == 2 and max(compiled) < min(begun)
    assert any("8x8 of stage 1" in said[place] for place in compiled)
    assert "from step 4 on: stage 2 of 2, steps 4 to 5" in said[begun[1]]
    assert open_stored(tmp_path / "run").config.data.resolution == 16
    assert read_config(tmp_path / "run").train.stages == (SMALL, LARGE)


class KilledError(BaseException):
    """Stands for whatever ends a process early."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_killed_at_any_step_goes_on_bit_for_bit(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    evaluated = {"validation__every_steps": 5, "validation__split": "train[30:]", "validation__timesteps": (500,)}
    drawn = {"sample__every_steps": 9, "sample__prompts": ("1",)}
    changes = {**evaluated, **drawn, "checkpoint__every_steps": 1, "train__stages": (SMALL, SIZES)}
    with quick_compilation(tmp_path):
        train(staged(data, **changes), tmp_path / "whole")
        whole = record(tmp_path / "whole")
        assert [line[:2] for line in whole] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2)]
        validated = [line for line in lines(tmp_path / "whole") if "validation_plain" in line]
        assert [line["step"] for line in validated] == [0, 3, 5]  # and at the seam
        assert "validation_plain_24x16" in validated[-1] and "validation_plain_24x16" not in validated[1]
        for name, side in (("step_0", 8), ("step_3", 8), ("step_5", 16)):
            [drawn_record] = json.loads((tmp_path / "whole" / "samples" / f"{name}.json").read_text())["records"]
            left, top, right, bottom = drawn_record["box"]
            assert (right - left, bottom - top) == (side, side)
        assert [load_trained(tmp_path / "whole", step).config.data.resolution for step in (3, 5)] == [8, 16]
        for stop in range(1, 6):
            workdir = tmp_path / f"killed after {stop}"

            def fails(folder: Any, start: int, steps: int, stop: int = stop) -> Any:
                return _Killing(stop)

            WRITERS.register("killing", fails)
            with contextlib.suppress(KilledError):
                train(staged(data, **changes, train__writers=("jsonl", "killing")), workdir)
            assert len(record(workdir)) == stop
            train(staged(data, **changes), workdir)
            assert record(workdir) == whole


class _Killing:
    """A writer that ends the program at a step."""

    def __init__(self, stop: int):
        self._stop = stop

    def scalars(self, step: int, values: Any) -> None:
        if step == self._stop and "loss" in values:
            raise KilledError

    def images(self, *_: Any) -> None: ...

    def close(self) -> None: ...


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_stages_are_the_chain_of_runs_that_one_makes_by_hand(
    data: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one batch size, a constant rate and no warm-up, a run whose pictures are exchanged by hand is the same."""
    plain = {"optimizer__decay": "constant", "optimizer__warmup_steps": 0, "train__compile_ahead": 0}
    stages = ("train.steps=3 data.resolution=8", "train.steps=2")
    with quick_compilation(tmp_path):
        train(staged(data, **plain, train__stages=stages), tmp_path / "staged")
        alone = {**plain, "train__stages": ()}
        train(staged(data, **alone, train__steps=3, data__resolution=8), tmp_path / "chain")
        config = read_config(tmp_path / "chain")
        config.data.resolution = 16
        write_config(tmp_path / "chain", config)
        monkeypatch.setattr(states, "check_fingerprint", lambda saved, now: None)  # which knows that it was 8
        train(staged(data, **alone), tmp_path / "chain")
    chain = [(line["step"], float(line["loss"]).hex()) for line in lines(tmp_path / "chain") if "loss" in line]
    assert [(line[0], line[2]) for line in record(tmp_path / "staged")] == chain and len(chain) == 5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_resume_adds_stages_and_a_changed_past_is_refused(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with quick_compilation(tmp_path):
        train(staged(data, train__stages=(SMALL,), train__steps=3), tmp_path / "run")
        train(staged(data), tmp_path / "run")
        assert [line[:2] for line in record(tmp_path / "run")][-2:] == [(4, 2), (5, 2)]
        with pytest.raises(UserError, match=r"stage 1 has begun, with data\.resolution = 8, but now has 16"):
            train(staged(data, train__stages=(SMALL.replace("=8 ", "=16 "), LARGE)), tmp_path / "run")
        longer = (SMALL.replace("steps=3", "steps=4"), LARGE)
        with pytest.raises(UserError, match="stage 1 has begun, with steps 1 to 3, but now has steps 1 to 4"):
            train(staged(data, train__stages=longer, train__steps=6), tmp_path / "run")


def _train(data: str, workdir: str, steps: int) -> list[float]:
    """Trains up to a step: stages that have not begun may change, and so may the end of the present one."""
    stages = [SMALL.replace("steps=3", f"steps={min(3, steps)}")]
    if steps > 3:
        stages.append(SIZES.replace("steps=2", f"steps={steps - 3}"))
    constant = {"optimizer__decay": "constant", "checkpoint__every_steps": 1}
    train(staged(data, train__stages=tuple(stages), train__steps=steps, **constant), workdir)
    return [line["loss"] for line in lines(pathlib.Path(workdir)) if "loss" in line]


def _together(data: pathlib.Path, workdir: pathlib.Path, steps: int, processes: int, devices: int) -> list[float]:
    return call_together([(_train, str(data), str(workdir), steps)] * processes, devices, seconds=900)[0]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_losses_are_the_same_on_any_number_of_processes_and_resumed_at_any_step(
    data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    whole = _together(data, tmp_path / "whole", 5, 1, 1)
    assert len(whole) == 5 and np.isfinite(whole).all()
    for processes, devices in ((2, 2), (4, 1)):
        np.testing.assert_allclose(_together(data, tmp_path / f"{processes}", 5, processes, devices), whole, rtol=2e-5)
    for step, (processes, devices) in enumerate(((1, 1), (2, 1), (4, 1), (1, 2), (2, 2)), start=1):
        found = _together(data, tmp_path / "resumed", step, processes, devices)
    np.testing.assert_allclose(found, whole, rtol=2e-5)
