"""Fully sharded training: the numbers of one device, and no more traffic than the method has."""

import math
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree
from ml_collections import ConfigDict

from offsetjax.models.pipeline import build, for_training
from offsetjax.models.task import task_of
from offsetjax.models.tokenizer import train_tokenizer
from offsetjax.parallel import fsdp, sharding
from offsetjax.training.objective import add_position
from offsetjax.training.step import make_gradient
from tests.tiny import quick_compilation, tiny_config

BATCH = 8
MESHES = ((8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 4, 2))


@pytest.fixture(scope="module", autouse=True)
def _quickly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with quick_compilation(tmp_path_factory.getbasetemp()):
        yield


def _config(**changes: Any) -> ConfigDict:
    # Two heads of each, so that `tensor` has something to split.
    return tiny_config(train__global_batch_size=BATCH, **changes)


class Program:
    """A real model's loss and gradients, and what they are taken of."""

    def __init__(self, config: ConfigDict):
        self.config = config
        texts = config.model.text_encoder
        tokenizer = train_tokenizer(("a black square",), texts.vocab_size, texts.max_position_embeddings)
        self.pipeline = for_training(build(config, {"text_encoder": tokenizer}), config.data.resolution, "cpu")
        keys = jax.random.split(jax.random.key(0), 3)
        params = {part: model.init(key) for (part, model), key in zip(self.pipeline.parts.items(), keys, strict=True)}
        self.params, self.frozen = {"unet": params.pop("unet")}, params
        rng = np.random.default_rng(0)
        side, length = config.data.resolution, texts.max_position_embeddings
        self.batch = add_position(
            {
                "pixels": rng.integers(0, 256, (BATCH, side, side, 3), dtype=np.uint8),
                "input_ids": {"text_encoder": rng.integers(0, 9, (BATCH, length), dtype=np.int32)},
                "time_ids": np.zeros((BATCH, 6), np.float32),
                "is_truncated": np.zeros(BATCH, bool),
                "is_replaced": np.zeros(BATCH, bool),
            },
            BATCH,
        )
        self.gradient = make_gradient(task_of(config).objective(self.pipeline, config))

    def alone(self) -> tuple[jax.Array, PyTree]:
        return jax.jit(self.gradient)(self.params, self.frozen, self.batch, jnp.int32(3))

    def lowered(self, mesh: Mesh) -> jax.stages.Lowered:
        where = partial(sharding.shardings, mesh, self.pipeline.sharding)
        params, whole = where(self.params), NamedSharding(mesh, P())
        split = jax.tree.map(lambda _: NamedSharding(mesh, sharding.BATCH), self.batch)
        return jax.jit(
            fsdp.on_mesh(self.gradient, mesh, self.pipeline.sharding, self.pipeline.dtypes),
            in_shardings=(params, where(self.frozen), split, whole),
            out_shardings=(whole, params),
        ).lower(self.params, self.frozen, self.batch, jnp.int32(3))

    def on(self, mesh: Mesh) -> tuple[jax.Array, PyTree]:
        rules = self.pipeline.sharding
        placed = jax.device_put(self.params, sharding.shardings(mesh, rules, self.params))
        frozen = jax.device_put(self.frozen, sharding.shardings(mesh, rules, self.frozen))
        batch = jax.device_put(self.batch, NamedSharding(mesh, sharding.BATCH))
        step = jax.device_put(jnp.int32(3), NamedSharding(mesh, P()))
        return self.lowered(mesh).compile()(placed, frozen, batch, step)


@pytest.fixture(scope="module")
def program() -> Program:
    return Program(_config())


@pytest.fixture(scope="module")
def alone(program: Program) -> tuple[jax.Array, PyTree]:
    return program.alone()


def _difference(these: PyTree, those: PyTree) -> float:
    """The norm of the difference, as a share of the norm."""
    squares = jax.tree.map(lambda x, y: (np.sum(np.square(x - y)), np.sum(np.square(y))), these, those)
    pairs = jax.tree.leaves(squares, is_leaf=lambda x: isinstance(x, tuple))
    return math.sqrt(sum(difference for difference, _ in pairs) / sum(size for _, size in pairs))


@pytest.mark.parametrize(("data", "fsdp_size", "tensor"), MESHES)
def test_loss_and_gradients_are_those_of_one_device(
    program: Program, alone: tuple[jax.Array, PyTree], data: int, fsdp_size: int, tensor: int
) -> None:
    loss, gradients = program.on(sharding.mesh_of(data=data, fsdp=fsdp_size, tensor=tensor))
    assert float(loss) == pytest.approx(float(alone[0]), rel=1e-6)
    assert _difference(jax.device_get(gradients), jax.device_get(alone[1])) < 1e-5


def test_a_batch_in_parts_has_the_same_gradient_on_a_mesh(alone: tuple[jax.Array, PyTree]) -> None:
    parts = Program(_config(train__accumulate_steps=2))
    loss, gradients = parts.on(sharding.mesh_of(data=2, fsdp=2))
    assert float(loss) == pytest.approx(float(alone[0]), rel=1e-6)
    assert _difference(jax.device_get(gradients), jax.device_get(alone[1])) < 1e-5


def test_weights_are_gathered_once_a_pass_in_the_compute_type_and_gradients_scattered_once() -> None:
    """Counted in the program as it is handed to the compiler, which may join exchanges but adds none."""
    for remat, passes in (("none", 1), ("blocks", 2)):
        program = Program(_config(model__dtype="bfloat16", model__remat=remat))
        mesh = sharding.mesh_of(data=2, fsdp=4)
        text = program.lowered(mesh).as_text()
        specs = sharding.specs(mesh, program.pipeline.sharding, program.params)["unet"]
        sizes = [
            leaf.size
            for leaf, spec in zip(jax.tree.leaves(program.params), jax.tree.leaves(specs), strict=True)
            if "fsdp" in spec
        ]
        gathered, scattered = _exchanged(text, "all_gather"), _exchanged(text, "reduce_scatter")
        assert sorted(scattered["f32"]) == sorted(sizes)
        assert set(scattered) == {"f32"}
        assert set(gathered) == {"bf16"}
        frozen = sum(leaf.size for leaf in jax.tree.leaves(program.frozen["text_encoder"]))
        assert sum(gathered["bf16"]) <= (passes + 0.2) * sum(sizes) + frozen + _encoder_size(program)


def test_the_gradients_of_a_block_wait_for_each_other() -> None:
    """Those of its inputs, and of its weights as they are before they are scattered; frozen ones have none."""
    mesh = sharding.mesh_of(data=1, fsdp=2)

    def on_device(trained: jax.Array, frozen: jax.Array, x: jax.Array) -> jax.Array:
        box = partial(fsdp.Shard, axis=0, dtype=jnp.dtype("float32"), rings=sharding.rings(mesh))
        params = {"kernel": box(frozen), "down": box(trained)}
        params, x = fsdp.gathered(params, x, ("down", "up"))
        assert isinstance(params["kernel"], fsdp.Shard)  # to be gathered where it is used
        return jnp.sum(x @ params["down"] @ params["kernel"].unbox())

    split = P("fsdp")
    loss = jax.shard_map(on_device, mesh=mesh, in_specs=(split, split, P()), out_specs=P(), check_vma=False)
    shapes = (4, 6), (6, 8), (5, 4)
    text = jax.jit(jax.grad(loss, argnums=(0, 2))).lower(*(jnp.zeros(shape) for shape in shapes)).as_text()
    (waiting,) = re.findall(r"stablehlo.optimization_barrier .*", text)
    assert waiting.endswith(": tensor<4x6xf32>, tensor<5x4xf32>")
    assert text.index("optimization_barrier") < text.index("stablehlo.reduce_scatter")


def _encoder_size(program: Program) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(program.frozen["vae"]))


def _exchanged(text: str, kind: str) -> dict[str, list[int]]:
    """Elements of the whole array in each exchange of a kind, by type."""
    found: dict[str, list[int]] = {}
    for given, got in re.findall(rf'"stablehlo\.{kind}".*?: \(tensor<([^>]+)>\) -> tensor<([^>]+)>', text, re.DOTALL):
        *sizes, dtype = (got if kind == "all_gather" else given).split("x")
        found.setdefault(dtype, []).append(math.prod(int(size) for size in sizes))
    return found


def test_large_arrays_that_nothing_divides_are_named() -> None:
    mesh = sharding.mesh_of(data=1, fsdp=8)
    tree = {"a": {"kernel": np.zeros((300, 300))}, "b": {"kernel": np.zeros((256, 300))}, "c": {"bias": np.zeros(9)}}
    kernels, rest = sharding.placed(mesh, (), tree)
    assert kernels.undivided == ("/a/kernel",)
    assert kernels.elements_per_device == 300 * 300 + 256 * 300 // 8
    assert (rest.arrays, rest.elements_per_device, rest.undivided) == (1, 9, ())
