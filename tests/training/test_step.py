"""The step: the same numbers on any mesh, in any number of parts, and unmoved by a batch that is not finite."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree
from ml_collections import ConfigDict

from offsetjax.diffusion.noise import offset_noise
from offsetjax.diffusion.noising import Noising
from offsetjax.models.family import Family, Tokens
from offsetjax.models.pipeline import Pipeline, noising_of
from offsetjax.models.stable_diffusion import SD1
from offsetjax.models.task import task_of
from offsetjax.parallel import sharding
from offsetjax.training.objective import add_position, batch_keys
from offsetjax.training.optimizer import make_optimizer
from offsetjax.training.placed import place
from offsetjax.training.setup import Run
from offsetjax.training.step import TrainState, accumulate, init_state, make_gradient, make_train_step
from tests.tiny import quick_compilation, tiny_config, update_of

SIZE = 3 * 4 * 4
MESHES = ((1, 1), (2, 1), (4, 1), (8, 1), (1, 8), (2, 4))


@pytest.fixture(scope="module", autouse=True)
def _quickly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with quick_compilation(tmp_path_factory.getbasetemp()):
        yield


class _Identity:
    """Latents are the pixels."""

    dtype, downscale, scaling_factor = jnp.float32, 1, 1.0

    def encode(self, params: PyTree, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        return pixels * params["gain"], jnp.full_like(pixels, -4.0)


class _Matrix:
    """One matrix, large enough to be sharded."""

    dtype = jnp.float32

    def apply(
        self, params: PyTree, noisy: jax.Array, timesteps: jax.Array, encoder_hidden_states: jax.Array
    ) -> jax.Array:
        params = flax.core.meta.unbox(params)  # as Flax's modules do, weight by weight
        flat = noisy.reshape(len(noisy), SIZE) @ params["dense"]["kernel"] + params["dense"]["bias"]
        return (flat + encoder_hidden_states[:, :1] + timesteps[:, None] / 1000.0).reshape(noisy.shape)


class _Embedding:
    dtype = jnp.float32

    def apply(self, params: PyTree, input_ids: jax.Array) -> tuple[jax.Array, None]:
        return input_ids.astype(jnp.float32), None


@dataclass(frozen=True)
class LinearPipeline(Pipeline):
    """Stable Diffusion 1.x of parts that compile at once."""

    family: Family = SD1
    parts: Mapping[str, Any] = field(
        default_factory=lambda: {"vae": _Identity(), "unet": _Matrix(), "text_encoder": _Embedding()}
    )
    noising: Noising = field(default_factory=lambda: noising_of(tiny_config(), downscale=1))
    settings: Mapping[str, Any] = field(default_factory=lambda: {"force_zeros_for_empty_prompt": False})

    def tokens(self, caption: str) -> Tokens:
        return Tokens({"text_encoder": np.zeros(2, np.int32)}, 2, 2)


def _pipeline(config: ConfigDict) -> LinearPipeline:
    return LinearPipeline(noising=noising_of(config, downscale=1))


def _config(**changes: Any) -> ConfigDict:
    return tiny_config(encode__caption_dropout=0.5, **{"train__global_batch_size": 32, **changes})


def _params() -> PyTree:
    kernel = np.random.default_rng(1).normal(size=(SIZE, SIZE)).astype(np.float32) * 0.1
    return {"unet": {"dense": {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(SIZE)}}}


def _batch(number: int = 0, count: int = 32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)
    return {
        "pixels": rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8),
        "input_ids": {"text_encoder": rng.integers(1, 9, (count, 2), dtype=np.int32)},
        "time_ids": np.zeros((count, 6), np.float32),
        "is_truncated": np.zeros(count, bool),
        "is_replaced": np.zeros(count, bool),
    }


@dataclass
class Trainer:
    """The real jitted step on a mesh, with its state."""

    config: ConfigDict
    mesh: Mesh
    gain: float = 1.0

    def __post_init__(self) -> None:
        state = init_state(_params(), update_of(self.config))
        shardings = sharding.shardings(self.mesh, (), state)
        frozen = {"vae": {"gain": jnp.float32(self.gain)}, "text_encoder": {"unused": jnp.zeros(1)}}
        self.frozen = jax.device_put(frozen, sharding.shardings(self.mesh, (), frozen))
        self.state: TrainState = jax.device_put(state, shardings)
        run = Run(self.config, None, self.mesh, _pipeline(self.config), self.frozen)
        objective = task_of(run.config).objective(run.pipeline, run.config)
        self.train_step = place(objective, run.pipeline.dtypes, run, shardings)

    def step(self, number: int = 0) -> dict[str, float]:
        batch = jax.device_put(_batch(number), NamedSharding(self.mesh, sharding.BATCH))
        self.state, metrics = self.train_step(self.state, self.frozen, batch)
        return {name: float(value) for name, value in metrics.items()}


def _mesh(data: int, fsdp: int) -> Mesh:
    return sharding.mesh_of(data=data, fsdp=fsdp)


def test_the_losses_are_the_same_on_any_mesh() -> None:
    runs = {}
    for data, fsdp in MESHES:
        trainer = Trainer(_config(), _mesh(data, fsdp))
        losses = [trainer.step(number)["loss"] for number in range(3)]
        runs[data, fsdp] = [*losses, float(jnp.sum(jnp.abs(trainer.state.params["unet"]["dense"]["kernel"])))]
        assert len(trainer.state.params["unet"]["dense"]["kernel"].sharding.device_set) == data * fsdp
        spread = 1 if fsdp == 1 else fsdp
        assert trainer.state.params["unet"]["dense"]["kernel"].addressable_shards[0].data.size == SIZE * SIZE / spread
    for mesh, values in runs.items():
        assert values == pytest.approx(runs[1, 1], rel=2e-6), mesh


def test_the_noise_is_the_same_bit_for_bit_on_any_mesh() -> None:
    def draw(positions: jax.Array) -> jax.Array:
        keys = batch_keys(0, "noise", jnp.int32(7), {"position": positions})
        return jax.vmap(lambda key: offset_noise(key, jnp.zeros((4, 8, 8)), 0.1))(keys)

    draws = []
    for data, fsdp in MESHES:
        split = NamedSharding(_mesh(data, fsdp), sharding.BATCH)
        draws.append(np.asarray(jax.jit(draw, in_shardings=split, out_shardings=split)(jnp.arange(8))))
    assert {noise.tobytes() for noise in draws} == {draws[0].tobytes()}


@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(parts: int) -> None:
    config = _config()
    objective = task_of(config).objective(_pipeline(config), config)
    frozen = {"vae": {"gain": jnp.float32(1.0)}, "text_encoder": None}
    batch = add_position(jax.tree.map(jnp.asarray, _batch()), 32)

    def loss(params: PyTree, part: Mapping[str, jax.Array]) -> jax.Array:
        return objective(params, frozen, part, jnp.int32(3)).mean()

    whole, split = (jax.jit(lambda params, n=n: accumulate(loss, params, batch, n))(_params()) for n in (1, parts))
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(split), strict=True):
        assert np.asarray(other) == pytest.approx(np.asarray(one), rel=1e-5, abs=1e-7)


def test_a_step_in_parts_is_the_same_on_eight_devices() -> None:
    losses = []
    for parts in (1, 2, 4):
        trainer = Trainer(_config(train__accumulate_steps=parts), _mesh(2, 4))
        losses.append([trainer.step(number)["loss"] for number in range(2)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_a_step_of_parts_of_different_sizes_is_the_mean_over_all_examples() -> None:
    """Parts of 8, 16 and 8 examples are the batch of 32: each has the draws of its place there."""
    whole = Trainer(_config(), _mesh(2, 4))
    mixed = Trainer(_config(data__mixed_sizes=True, train__accumulate_steps=3), _mesh(2, 4))
    split = NamedSharding(mixed.mesh, sharding.BATCH)
    for number in range(2):
        batch, expected = _batch(number), whole.step(number)
        batch["is_truncated"][[1, 30]] = True
        parts = [jax.tree.map(lambda x, at=at: x[at], batch) for at in (slice(8), slice(8, 24), slice(24, 32))]
        mixed.state, found = mixed.train_step(mixed.state, mixed.frozen, jax.device_put(parts, split))
        losses = found.pop("part_losses")
        assert {name: float(value) for name, value in found.items() if name != "captions_truncated"} == pytest.approx(
            {name: value for name, value in expected.items() if name != "captions_truncated"}, rel=1e-5
        )
        assert float(found["loss"]) == pytest.approx(float(losses[0] + 2 * losses[1] + losses[2]) / 4, rel=1e-6)
        assert float(found["captions_truncated"]) == 2 * (number + 1)
    for one, other in zip(jax.tree.leaves(whole.state.params), jax.tree.leaves(mixed.state.params), strict=True):
        np.testing.assert_allclose(other, one, rtol=2e-4, atol=1e-6)


def _bytes(tree: PyTree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_a_batch_that_makes_nan_changes_nothing_but_the_counters() -> None:
    trainer = Trainer(_config(), _mesh(2, 4))
    trainer.step(0)
    kept = ("params", "opt_state", "ema_params")
    before = {name: _bytes(getattr(trainer.state, name)) for name in kept}
    good, trainer.frozen = trainer.frozen, jax.tree.map(lambda x: x * jnp.nan, trainer.frozen)
    metrics = trainer.step(1)
    assert np.isnan(metrics["loss"])
    assert metrics["skipped"] == 1
    assert {name: _bytes(getattr(trainer.state, name)) for name in kept} == before
    assert (int(trainer.state.step), int(trainer.state.skipped)) == (2, 1)
    trainer.frozen = good
    assert np.isfinite(trainer.step(2)["loss"])
    assert (int(trainer.state.step), int(trainer.state.skipped)) == (3, 1)
    assert _bytes(trainer.state.params) != before["params"]


@pytest.mark.parametrize("times", [1, 5])
def test_a_finite_loss_with_an_infinite_gradient_is_skipped_too_however_often(times: int) -> None:
    config = _config()
    config.optimizer.warmup_steps = 10
    gradient = make_gradient(lambda params, *_: jnp.sqrt(params["w"]))  # slope ∞ at 0
    train_step = jax.jit(make_train_step(gradient, update_of(config)))
    state = first = init_state({"w": jnp.zeros(2)}, update_of(config))
    for _ in range(times):
        state, metrics = train_step(state, None, _batch())
        assert float(metrics["loss"]) == 0.0
        assert float(metrics["learning_rate"]) == float(
            make_optimizer(config.optimizer, config.train.steps).learning_rate(0)
        )  # the schedule waits as well
    assert int(state.skipped) == times
    assert _bytes((state.params, state.opt_state, state.ema_params)) == _bytes(
        (first.params, first.opt_state, first.ema_params)
    )


def test_the_average_follows_with_its_warm_up() -> None:
    config = _config(optimizer__ema_decay=0.5)
    train_step = jax.jit(
        make_train_step(make_gradient(lambda params, *_: params["w"] * jnp.ones(1)), update_of(config))
    )
    state = init_state({"w": jnp.ones(1)}, update_of(config))
    average = 1.0
    for step in range(12):
        state, _ = train_step(state, None, _batch())
        decay = min(0.5, (1 + step) / (10 + step))  # 0.1, 0.18, ..., then the limit
        average = decay * average + (1 - decay) * float(state.params["w"][0])
        assert float(state.ema_params["w"][0]) == pytest.approx(average, rel=1e-6)


def test_without_an_average_none_is_kept() -> None:
    config = _config(optimizer__ema_decay=0.0)
    trainer = Trainer(config, _mesh(1, 1))
    trainer.step()
    assert trainer.state.ema_params is None


def test_the_state_is_donated_and_the_step_is_compiled_once() -> None:
    trainer = Trainer(_config(), _mesh(2, 4))
    for number in range(3):
        old = jax.tree.leaves(trainer.state)
        trainer.step(number)
        assert all(leaf.is_deleted() for leaf in old)
    assert trainer.train_step._cache_size() == 1


def test_captions_that_were_cut_are_counted_from_the_first_step_on() -> None:
    config = _config()
    train_step = jax.jit(
        make_train_step(make_gradient(lambda params, *_: params["w"] * jnp.ones(1)), update_of(config))
    )
    state = init_state({"w": jnp.ones(1)}, update_of(config))
    for total in (3, 6):
        batch = _batch() | {"is_truncated": np.arange(32) < 3}
        state, metrics = train_step(state, None, batch)
        assert int(state.truncated) == int(metrics["captions_truncated"]) == total


def test_records_that_were_left_out_are_counted_from_the_first_step_on() -> None:
    config = _config()
    train_step = jax.jit(
        make_train_step(make_gradient(lambda params, *_: params["w"] * jnp.ones(1)), update_of(config))
    )
    state = init_state({"w": jnp.ones(1)}, update_of(config))
    for total in (2, 4):
        state, metrics = train_step(state, None, _batch() | {"is_replaced": np.arange(32) < 2})
        assert int(state.replaced) == int(metrics["records_replaced"]) == total


def test_the_metrics_are_those_of_the_step() -> None:
    trainer = Trainer(_config(), _mesh(1, 1))
    batch = add_position(jax.tree.map(jnp.asarray, _batch()), 32)
    objective = task_of(trainer.config).objective(_pipeline(trainer.config), trainer.config)

    def loss(params: PyTree) -> jax.Array:
        return objective(params, trainer.frozen, batch, jnp.int32(0)).mean()

    value, gradient = jax.value_and_grad(loss)(_params())
    norm = np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(gradient)))
    metrics = trainer.step()
    assert metrics["loss"] == pytest.approx(float(value), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert metrics["learning_rate"] == pytest.approx(1e-3)
