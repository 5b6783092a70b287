"""A training, whole, stopped and resumed: what is lost, what is repeated and what is refused."""

import itertools
import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jaxtyping import PyTree
from PIL import Image

import offsetjax.train as loop
from offsetjax.config import default_config, from_json
from offsetjax.data.devices import HOST_FIELDS
from offsetjax.data.source import open_source
from offsetjax.errors import UserError
from offsetjax.exporting.export import export
from offsetjax.models.trained import load_trained
from offsetjax.train import train
from offsetjax.training.setup import open_run
from tests.tiny import CAPTIONS, RESOLUTION, build_data, data_path, quick_compilation, run_config, trained_workdir
from tests.training.test_metrics import read_events

STEPS = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module", autouse=True)
def environment(base: pathlib.Path) -> Iterator[dict[str, str]]:
    with quick_compilation(base) as variables:
        yield variables


@pytest.fixture(scope="module")
def data(base: pathlib.Path) -> pathlib.Path:
    return data_path(base)


@pytest.fixture(scope="module")
def straight(base: pathlib.Path) -> pathlib.Path:
    """The uninterrupted training."""
    return trained_workdir(base)


@pytest.fixture
def copy(straight: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """The finished training, to be changed."""
    shutil.copytree(straight, tmp_path / "a copy")
    return tmp_path / "a copy"


class KilledError(Exception):
    """Stands for whatever ends a process early."""


class Watched:
    """The real train step, which notes its calls and may fail at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None):
        self.calls, self._fail_at, self._make = 0, fail_at, loop.jit_train_step
        monkeypatch.setattr(loop, "jit_train_step", self._jit)

    def _jit(self, *arguments: Any) -> Callable[..., Any]:
        self.jitted = self._make(*arguments)

        def step(*arguments: Any) -> Any:
            self.calls += 1
            if self.calls == self._fail_at:
                raise KilledError
            return self.jitted(*arguments)

        return step


def _lines(workdir: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _record(workdir: pathlib.Path) -> list[tuple[Any, ...]]:
    """What each step computed, in hex."""
    names = ("loss", "grad_norm", "learning_rate")
    return [(line["step"], *(float(line[name]).hex() for name in names), line["skipped"]) for line in _lines(workdir)]


def _bytes(tree: PyTree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def _weights(workdir: pathlib.Path, which: str) -> list[bytes]:
    return _bytes(load_trained(workdir, which=which).params)


def _assert_same_training(workdir: pathlib.Path, straight: pathlib.Path) -> None:
    assert _record(workdir) == _record(straight)
    for which in ("raw", "ema"):
        assert _weights(workdir, which) == _weights(straight, which)


def _snapshot(workdir: pathlib.Path) -> dict[str, bytes]:
    return {str(file.relative_to(workdir)): file.read_bytes() for file in workdir.rglob("*") if file.is_file()}


def test_a_training_leaves_its_record(straight: pathlib.Path) -> None:
    lines = _lines(straight)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 and line["step_seconds"] > 0 for line in lines)
    assert [(step, value) for step, name, value in read_events(straight) if name == "loss"] == [
        (line["step"], pytest.approx(line["loss"])) for line in lines
    ]
    assert sorted(int(folder.name) for folder in (straight / "checkpoints").iterdir()) == [2, 4, 6]
    assert from_json((straight / "config.json").read_text()).train.steps == STEPS


def test_pictures_are_drawn_before_during_and_after(straight: pathlib.Path) -> None:
    samples = straight / "samples"
    assert {file.name for file in samples.iterdir()} == {
        f"step_{step}.{kind}" for step in (0, 3, 6) for kind in ("png", "json")
    }
    for step in (0, 3, 6):
        with Image.open(samples / f"step_{step}.png") as grid:
            assert grid.width >= RESOLUTION
            assert grid.height >= 2 * RESOLUTION
        about = json.loads((samples / f"step_{step}.json").read_text())
        assert (about["step"], about["params"]) == (step, "ema")
        assert [record["prompt"] for record in about["records"]] == list(CAPTIONS[:2])


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [2, 4])
def test_a_training_that_fails_between_checkpoints_goes_on_as_if_it_had_not(
    stop_at: int, data: pathlib.Path, straight: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = tmp_path / "work dir"
    with monkeypatch.context() as patch:
        Watched(patch, fail_at=stop_at)
        with pytest.raises(KilledError):
            train(run_config(data), workdir)
    assert len(_lines(workdir)) < STEPS
    watched = Watched(monkeypatch)
    train(run_config(data), workdir)
    assert watched.calls == STEPS - (stop_at - 1) // 2 * 2  # from the checkpoint before, or from the start
    _assert_same_training(workdir, straight)


KILL = """
import os, signal, sys
import offsetjax.train as loop
from tests.tiny import run_config

calls, make = [], loop.jit_train_step

def jit_train_step(*arguments):
    jitted = make(*arguments)
    def step(*arguments):
        calls.append(0)
        if len(calls) == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return jitted(*arguments)
    return step

loop.jit_train_step = jit_train_step
loop.train(run_config(sys.argv[1]), sys.argv[2])
"""


def test_a_killed_process_goes_on_as_if_it_had_not_been(
    data: pathlib.Path,
    straight: pathlib.Path,
    tmp_path: pathlib.Path,
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workdir = tmp_path / "work dir"
    devices = {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    command = [sys.executable, "-c", KILL, str(data), str(workdir), "5"]  # while step 4 is being saved, or after
    killed = subprocess.run(command, env={**os.environ, **environment, **devices}, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [line["step"] for line in _lines(workdir)] == [1, 2, 3, 4]
    watched = Watched(monkeypatch)
    train(run_config(data), workdir)
    assert watched.calls in (STEPS - 2, STEPS - 4)
    assert watched.jitted._cache_size() == 1  # compiled at its first step, and never again
    _assert_same_training(workdir, straight)
    steps = [step for step, name, _ in read_events(workdir) if name == "loss"]
    assert set(steps) == set(range(1, STEPS + 1))


def test_a_training_at_its_end_says_so_and_changes_nothing(
    data: pathlib.Path, copy: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = _snapshot(copy)
    with caplog.at_level(logging.INFO, "offsetjax"):
        train(run_config(data), copy)
    assert "has its 6 steps; raise train.steps to continue" in caplog.messages[-1]
    assert _snapshot(copy) == before


def test_what_the_losses_depend_on_may_not_change(data: pathlib.Path, copy: pathlib.Path) -> None:
    before = _snapshot(copy)
    for field, value in {
        "seed": 1,
        "noise.offset_strength": 0.2,
        "optimizer.learning_rate": 2e-3,
        "train.global_batch_size": 16,
        "data.random_flip": False,
        "model.unet.layers_per_block": 2,
        "schedule.prediction_type": "v_prediction",
        "loss.min_snr_gamma": 5.0,
    }.items():
        with pytest.raises(UserError, match=rf"config: {field} = .*, but .* was begun with .*; set it back"):
            train(run_config(data, **{field: value}), copy)
    assert _snapshot(copy) == before


def test_what_they_do_not_depend_on_may(data: pathlib.Path, copy: pathlib.Path) -> None:
    changes = {"train.steps": 9, "mesh.data": 8, "mesh.fsdp": 1, "sample.num_steps": 3, "checkpoint.max_to_keep": 1}
    run = open_run(run_config(data, **changes), copy, open_source(data))
    assert {field: run.config[field.split(".")[0]][field.split(".")[1]] for field in changes} == changes
    assert from_json((copy / "config.json").read_text()) == run.config


def test_other_data_is_refused(copy: pathlib.Path, tmp_path: pathlib.Path) -> None:
    other = build_data(tmp_path / "other", count=24)
    with pytest.raises(UserError, match="data: num_examples is 24, but the checkpoint was written with 16"):
        train(run_config(other, train__steps=7), copy)


def test_the_same_data_elsewhere_is_accepted(data: pathlib.Path, copy: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(data, tmp_path / "moved data")
    train(run_config(tmp_path / "moved data"), copy)


def test_checkpoints_without_their_config_are_refused(data: pathlib.Path, copy: pathlib.Path) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(UserError, match=r"has been trained but has no config\.json"):
        train(run_config(data), copy)


def test_a_damaged_config_is_refused(data: pathlib.Path, copy: pathlib.Path) -> None:
    (copy / "config.json").write_text('{"seed": 0,')
    with pytest.raises(UserError, match=r"config\.json is no config .*; restore it from a copy"):
        train(run_config(data), copy)


def test_a_start_that_was_cut_short_begins_anew(
    data: pathlib.Path, copy: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("config.json", "metrics.jsonl", "saved.json"):
        (copy / name).unlink()
    shutil.rmtree(copy / "checkpoints")
    (copy / "frozen" / "vae" / "config.json").write_text("")
    Watched(monkeypatch, fail_at=1)
    with pytest.raises(KilledError):
        train(run_config(data), copy)
    assert json.loads((copy / "frozen" / "vae" / "config.json").read_text())


@pytest.mark.parametrize(("resolution", "unit"), [(15, 2)])
def test_a_resolution_that_the_networks_cannot_halve_is_refused(
    data: pathlib.Path, tmp_path: pathlib.Path, resolution: int, unit: int
) -> None:
    with pytest.raises(UserError, match=f"data.resolution = {resolution} must be a multiple of {unit}"):
        train(run_config(data, data__resolution=resolution), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_a_training_started_from_may_be_gone_when_it_resumes(
    data: pathlib.Path, straight: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    pretrained, workdir = tmp_path / "pretrained", tmp_path / "fine-tuned"
    export(straight, pretrained)
    config = run_config(data, model__pretrained=str(pretrained))
    for part in ("unet", "vae", "text_encoder"):  # what is left out is read from `pretrained`
        config.model[part] = default_config().model[part]
    begun = open_run(config, workdir, open_source(data))
    assert begun.config.model.unet.block_out_channels == run_config(data).model.unet.block_out_channels
    shutil.rmtree(pretrained)
    reopened = open_run(config, workdir, open_source(data))
    assert reopened.config == begun.config
    assert _bytes(reopened.frozen) == _bytes(begun.frozen)
    config.model.unet.layers_per_block = 3
    with pytest.raises(UserError, match=r"model\.unet\.layers_per_block = 3"):
        open_run(config, workdir, open_source(data))


def test_nothing_waits_for_the_devices_between_logs_and_logs_are_a_step_late(
    data: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched, fetched = Watched(monkeypatch), []
    device_get = jax.device_get

    def note(tree: Any) -> Any:
        if watched.calls:
            fetched.append((watched.calls, sorted(tree)))
        return device_get(tree)

    monkeypatch.setattr(jax, "device_get", note)
    changes = {"train.log_every_steps": 3, "sample.every_steps": 0, "checkpoint.every_steps": 100}
    train(run_config(data, **changes), tmp_path / "run")
    # Steps 1 and 3 are fetched when the next has begun, and 6 is the last: at no other step is anything fetched.
    assert [calls for calls, _ in fetched] == [2, 4, 6]
    assert all("loss" in names for _, names in fetched)
    assert [line["step"] for line in _lines(tmp_path / "run")] == [1, 3, 6]


def test_a_transfer_inside_the_step_cannot_hide(
    data: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def left_on_the_host(batches: Iterator[Any], *_: Any) -> Iterator[Any]:
        for batch in itertools.islice(batches, 2):
            yield {name: field for name, field in batch.items() if name not in HOST_FIELDS}

    monkeypatch.setattr(loop, "on_devices", left_on_the_host)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        train(run_config(data, **{"sample.every_steps": 0}), tmp_path / "run")


@pytest.mark.slow
def test_without_pictures_or_an_average_the_training_is_the_same(
    data: pathlib.Path, straight: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    changes = {"sample.every_steps": 0, "sample.params": "raw", "optimizer.ema_decay": 0.0}
    train(run_config(data, **changes), tmp_path / "run")
    for line, other in zip(_lines(tmp_path / "run"), _lines(straight), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-6)
    with pytest.raises(UserError, match="no average was kept"):
        load_trained(tmp_path / "run", which="ema")
