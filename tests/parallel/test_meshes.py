"""Every mesh of data x fsdp x tensor up to 8 devices: the same step, and a checkpoint that each other one resumes.

The model is small, but its parts are the real ones: `fsdp.on_mesh`, `Shard`s, the rules of `sharding`, the train step
and the checkpoint's placement. Its arrays are split over `fsdp`, `tensor`, both, and, where nothing divides, over none.
"""

import itertools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from offsetjax.config import default_config
from offsetjax.parallel import fsdp, sharding
from offsetjax.storage import checkpoint
from offsetjax.training.step import TrainState, init_state, make_gradient, make_train_step
from tests.tiny import quick_compilation, update_of

SIZES = [shape for shape in itertools.product(range(1, 9), repeat=3) if np.prod(shape) <= 8]
RULES = sharding.split_layers("to_q", "to_out_0")
BATCH, WIDTH, HIDDEN = 840, 16, 24  # 840: a multiple of 1 to 8


def _config() -> Any:
    config = default_config()
    config.train.update(global_batch_size=BATCH, steps=10)
    config.optimizer.update(learning_rate=1e-2, warmup_steps=0, ema_decay=0.9)
    return config


def _objective(params: PyTree, frozen: PyTree, batch: PyTree, step: Array) -> Array:
    whole: Any = meta.unbox(params["unet"])
    still: Any = meta.unbox(frozen["vae"])
    x = batch["pixels"] @ still["conv_in"]["kernel"]
    queries = jnp.tanh(x @ whole["to_q"]["kernel"] + whole["to_q"]["bias"])
    hidden = jax.nn.gelu(queries @ whole["to_out_0"]["kernel"])
    odd = hidden @ whole["proj"]["kernel"]
    return jnp.square(odd - batch["pixels"][:, :7]).mean(-1)


def _start() -> tuple[PyTree, PyTree, PyTree]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.3, shape).astype(np.float32)

    params = {
        "to_q": {"kernel": normal(WIDTH, HIDDEN), "bias": normal(HIDDEN)},
        "to_out_0": {"kernel": normal(HIDDEN, WIDTH)},
        "proj": {"kernel": normal(WIDTH, 7)},
    }
    flags = {name: np.zeros(BATCH, bool) for name in ("is_truncated", "is_replaced")}
    return (
        {"unet": params},
        {"vae": {"conv_in": {"kernel": normal(WIDTH, WIDTH)}}},
        {"pixels": normal(BATCH, WIDTH), **flags},
    )


@pytest.fixture(scope="module", autouse=True)
def _quickly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with quick_compilation(tmp_path_factory.getbasetemp()):
        yield


class Trainer:
    """The train step on one mesh, and what its state looks like there."""

    def __init__(self, shape: tuple[int, int, int]):
        data, parts, tensor = shape
        config, self.mesh = _config(), sharding.mesh_of(data=data, fsdp=parts, tensor=tensor)
        self.params, frozen, batch = _start()
        like = jax.eval_shape(lambda params: init_state(params, update_of(config)), self.params)
        self.shardings = sharding.shardings(self.mesh, RULES, like)
        gradient = fsdp.on_mesh(make_gradient(_objective), self.mesh, RULES, {"unet": jnp.float32, "vae": jnp.float32})
        frozen_shardings, self.rows = (
            sharding.shardings(self.mesh, RULES, frozen),
            NamedSharding(self.mesh, sharding.BATCH),
        )
        self.frozen, self.batch = jax.device_put(frozen, frozen_shardings), jax.device_put(batch, self.rows)
        self.begin = jax.jit(lambda params: init_state(params, update_of(config)), out_shardings=self.shardings)
        self.step = jax.jit(
            make_train_step(gradient, update_of(config)),
            in_shardings=(self.shardings, frozen_shardings, self.rows),
            out_shardings=(self.shardings, NamedSharding(self.mesh, P())),
        )

    def run(self, state: TrainState, steps: int) -> TrainState:
        for _ in range(steps):
            state, _ = self.step(state, self.frozen, self.batch)
        return state

    def gathered(self, state: TrainState) -> TrainState:
        return jax.tree.map(np.asarray, state)


def _difference(one: PyTree, other: PyTree) -> float:
    """The largest, over all arrays, as a part of the array's largest value."""
    parts = [
        np.abs(a - b).max() / (np.abs(b).max() or 1) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True)
    ]
    return float(max(parts))


def _train_and_resume(shapes: list[tuple[int, int, int]], workdir: pathlib.Path) -> None:
    """Each mesh makes two steps and saves; each mesh reads what each other one saved, and makes the third."""
    trainers = {shape: Trainer(shape) for shape in shapes}
    alone = trainers[1, 1, 1]
    two = alone.run(alone.begin(alone.params), 2)
    third = alone.gathered(alone.run(two, 1))
    for number, (shape, trainer) in enumerate(trainers.items()):
        state = trainer.run(trainer.begin(trainer.params), 2)
        assert _difference(trainer.gathered(state), alone.gathered(two)) < 2e-5, shape
        with checkpoint.open_checkpoints(workdir / str(number)) as manager:
            checkpoint.save(manager, 2, state, {"fingerprint": {}})
            manager.wait_until_finished()
    for number, saved in enumerate(shapes):
        with checkpoint.open_checkpoints(workdir / str(number)) as manager:
            for shape, trainer in trainers.items():
                like = jax.eval_shape(lambda params: init_state(params, update_of(_config())), trainer.params)
                state, _ = checkpoint.restore(manager, checkpoint.abstract(like, trainer.shardings))
                assert _difference(trainer.gathered(trainer.run(state, 1)), third) < 2e-5, (saved, shape)


def test_a_few_meshes_train_alike_and_resume_each_other(tmp_path: pathlib.Path) -> None:
    _train_and_resume([(1, 1, 1), (1, 1, 2), (2, 2, 2)], tmp_path)


@pytest.mark.chaos
def test_every_mesh_trains_alike_and_resumes_every_other(tmp_path: pathlib.Path) -> None:
    _train_and_resume(SIZES, tmp_path)
    print(f"\n{len(SIZES)} meshes of up to 8 devices, {len(SIZES) ** 2} resumptions")
