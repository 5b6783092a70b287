"""What is never written: values that are not finite, and by choice spikes; and what a run says and does about them."""

import json
import logging
import pathlib
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offsetjax.data.source import open_source
from offsetjax.errors import UserError
from offsetjax.models.trained import load_trained
from offsetjax.parallel import sharding
from offsetjax.parallel.finite import all_finite
from offsetjax.report.conclusions import conclusions
from offsetjax.report.numbers import summarise
from offsetjax.report.read import read_runs
from offsetjax.storage.saving import Saver
from offsetjax.train import train
from offsetjax.training.goodput import Goodput, read_goodput
from offsetjax.training.spikes import followed, no_spikes, spike_ratio
from offsetjax.training.step import init_state, make_gradient, make_train_step
from tests.tiny import data_path, quick_compilation, tiny_config, update_of


@pytest.fixture(scope="module", autouse=True)
def _quickly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with quick_compilation(tmp_path_factory.getbasetemp()):
        yield


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_on_one_device_is_seen_by_all(value: float) -> None:
    mesh = sharding.mesh_of(data=2, fsdp=4)
    tree = {"dense": {"kernel": np.full((8, 16), 1e38, np.float32), "bias": np.zeros(3, np.float16)}, "n": np.int32(7)}
    look = jax.jit(lambda tree: all_finite(tree, mesh))
    places = sharding.shardings(mesh, (), tree)
    assert look(jax.device_put(tree, places)), "large values are finite ones, whatever their squares are"
    for name, place in (("kernel", (7, 15)), ("bias", 2)):
        wrong = jax.tree.map(np.copy, tree)
        wrong["dense"][name][place] = value
        assert not look(jax.device_put(wrong, places))
        assert not all_finite(jax.tree.map(jnp.asarray, wrong))


@pytest.mark.parametrize(
    "settings",
    [{"b1": 1.0}, {"b2": 1.0}, {"learning_rate": 3e38, "weight_decay": 3e38}, {"weight_decay": 1e30}],
    ids=str,
)
@pytest.mark.parametrize(("ema_decay", "saves_memory"), [(0.0, False), (0.9, True)])
def test_no_setting_of_the_optimizer_writes_what_is_not_finite(
    settings: dict[str, float], ema_decay: float, saves_memory: bool
) -> None:
    config = tiny_config(optimizer__ema_decay=ema_decay, train__global_batch_size=2)
    config.optimizer.update(settings)  # beyond the ranges of the fields
    gradient = make_gradient(lambda params, *_: (params["w"] - 3.0) ** 2)
    train_step = jax.jit(make_train_step(gradient, update_of(config), saves_memory=saves_memory))
    state = init_state({"w": jnp.ones(2)}, update_of(config))
    for _ in range(20):
        before = state
        state, _ = train_step(state, None, {"is_truncated": np.zeros(2, bool), "is_replaced": np.zeros(2, bool)})
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert int(state.skipped) > 0
    assert int(state.step) == 20
    for one, other in zip(jax.tree.leaves(before.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(one, other)


def _skipped(losses: np.ndarray, norms: np.ndarray, most: float) -> np.ndarray:
    """Which steps of a run with these losses and gradient norms are skipped."""

    def step(spikes, values):
        is_taken = spike_ratio(spikes, *values) <= most
        return followed(spikes, *values, is_taken), ~is_taken

    return np.asarray(jax.lax.scan(step, no_spikes(), (jnp.asarray(losses), jnp.asarray(norms)))[1])


def _clean(seed: int, count: int = 5000) -> tuple[np.ndarray, np.ndarray]:
    """A loss that falls to a tenth, and norms, with the scatter of small batches: a deviation of 40 %."""
    rng = np.random.default_rng(seed)
    falling = 0.1 + 0.9 * np.exp(-np.arange(count) / 500)
    return tuple((falling * rng.lognormal(0.0, 0.4, count)).astype(np.float32) for _ in range(2))


@pytest.mark.parametrize("most", [5.0, 10.0])
def test_spikes_are_skipped_and_clean_steps_are_not(most: float) -> None:
    assert sum(_skipped(*_clean(seed), most).mean() for seed in range(4)) / 4 < 0.001
    for which in (0, 1):  # in the loss, or in the gradient's norm
        series = _clean(9)
        places = [50, 333, 334, 2000, 4999]
        series[which][places] *= 100
        skipped = _skipped(*series, most)
        assert skipped[places].all()
        assert skipped.sum() - 5 < 0.001 * 5000


def test_a_lasting_jump_is_skipped_to_the_end_of_the_run_and_one_that_is_no_number_is_not_followed() -> None:
    losses, norms = _clean(3, 200)
    losses[100:] *= 1000
    assert _skipped(losses, norms, 10.0)[100:].all()
    losses, norms = _clean(3, 200)
    losses[60] = np.nan
    assert np.flatnonzero(_skipped(losses, norms, 10.0)).tolist() == [60]


def test_a_run_that_only_skips_ends_with_its_last_state_and_its_examples(
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    finish = Saver.finish
    monkeypatch.setattr(Saver, "finish", lambda saver: (time.sleep(0.5), finish(saver)))
    data = data_path(tmp_path_factory.getbasetemp())
    config = tiny_config(data, train__steps=40, train__max_skipped_in_a_row=3, checkpoint__every_steps=100)
    config.optimizer.update(learning_rate=1e3, weight_decay=1e3)  # in range: each step multiplies weights by -1e6
    with caplog.at_level(logging.WARNING), pytest.raises(UserError) as error:
        train(config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first = next(line["step"] for line in lines if line["skipped"])
    assert [line["skipped"] for line in lines if line["step"] >= first] == [1, 2, 3, 4]
    assert f"train: steps {first} to {first + 2} changed nothing (train.max_skipped_in_a_row = 3)" in str(error.value)
    assert f"saved as step {first + 3}" in str(error.value)
    [warning] = [each.message for each in caplog.records if "(1 so far)" in each.message]
    assert warning.startswith(f"step {first} changed nothing (1 so far): loss ")
    numbers = warning.partition("its examples are ")[2].partition(" of ")[0]
    assert all(0 <= int(number) < len(open_source(data)) for number in numbers.split(", "))
    assert len(numbers.split(", ")) == 8
    assert read_goodput(tmp_path)["checkpoint"] > 0.5
    Goodput(tmp_path).resumed(first + 3)
    assert read_goodput(tmp_path)["lost"] < 0.5, "the last save is waited for, and kept"
    for which in ("raw", "ema"):  # which refuses others
        trained = load_trained(tmp_path, which=which)
        assert trained.step == first + 3
    [summary] = (numbers := summarise(read_runs([str(tmp_path)])))["runs"]
    assert summary["steps_skipped"] == 4
    assert any("4 steps changed nothing" in each for each in conclusions(numbers, numbers["runs"]))
