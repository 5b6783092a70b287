"""Where the arrays of a real model lie, and the meshes that are refused."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree
from ml_collections import ConfigDict

from offsetjax.config import default_config
from offsetjax.errors import UserError
from offsetjax.models.pipeline import build
from offsetjax.models.weights import abstract_trained
from offsetjax.parallel import sharding
from offsetjax.training.step import TrainState, init_state
from tests.plan import topology
from tests.tiny import update_of

FSDP = 8
RULES = build(default_config()).sharding
MESH = {"data": 1, "fsdp": FSDP, "tensor": 1}


@pytest.fixture(scope="module")
def state() -> TrainState:
    """The train state of Stable Diffusion 1.x, abstract: its shapes are real, its 860 M parameters are not there."""
    config = default_config()
    trained = abstract_trained(build(config), config.lora)
    return jax.eval_shape(lambda params: init_state(params, update_of(config)), trained)


def _placed(tree: PyTree, data: int = 1, fsdp: int = FSDP) -> dict[str, tuple[tuple[int, ...], P]]:
    shardings = sharding.shardings(sharding.mesh_of(data=data, fsdp=fsdp), RULES, tree)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        sharding.path_name(path): (leaf.shape, where.spec)
        for (path, leaf), where in zip(leaves, jax.tree.leaves(shardings), strict=True)
    }


def test_every_kernel_of_stable_diffusion_is_split_and_every_bias_is_whole(state: TrainState) -> None:
    placed = _placed(state.params)
    assert sum(np.prod(shape) for shape, _ in placed.values()) == pytest.approx(859.5e6, rel=1e-3)
    for path, (shape, spec) in placed.items():
        if len(shape) < 2:
            assert spec == P(), path
            continue
        [axis] = [axis for axis, name in enumerate(spec) if name == "fsdp"]
        assert shape[axis] % FSDP == 0, path
        # Splitting the largest axis keeps what is gathered contiguous and even.
        assert shape[axis] == max(size for size in shape if size % FSDP == 0), path


def test_a_device_holds_an_eighth_of_the_state(state: TrainState) -> None:
    def share(shape: tuple[int, ...], spec: P) -> float:
        return np.prod(shape, dtype=np.float64) / (FSDP if "fsdp" in spec else 1)

    placed = _placed(state)
    whole = sum(np.prod(shape, dtype=np.float64) for shape, _ in placed.values())
    assert sum(share(*where) for where in placed.values()) / whole == pytest.approx(1 / FSDP, rel=0.01)


def test_moments_and_averages_lie_as_their_parameters(state: TrainState) -> None:
    params = {path: spec for path, (_, spec) in _placed(state.params).items()}
    followers = [
        (params[parameter], spec)
        for path, (_, spec) in _placed({"opt": state.opt_state, "ema": state.ema_params}).items()
        if (parameter := next((name for name in params if path.endswith(name)), None))
    ]
    assert len(followers) == 3 * len(params)
    assert all(expected == spec for expected, spec in followers)


def test_without_fsdp_everything_is_whole(state: TrainState) -> None:
    assert {spec for _, spec in _placed(state, data=8, fsdp=1).values()} == {P()}


def test_an_array_that_does_not_divide_is_whole() -> None:
    assert sharding.spec("/conv_in/kernel", (3, 3, 3, 5), MESH, RULES) == P()
    assert sharding.spec("/conv_in/kernel", (3, 3, 4, 16), MESH, RULES) == P(None, None, None, "fsdp")
    assert sharding.spec("/token_embedding/embedding", (49408, 768), MESH, RULES) == P("fsdp", None)


def _config(data: int, fsdp: int, global_batch_size: int = 8, accumulate_steps: int = 1) -> ConfigDict:
    config = default_config()
    config.mesh.update(data=data, fsdp=fsdp)
    config.train.update(global_batch_size=global_batch_size, accumulate_steps=accumulate_steps)
    return config


def _mesh(config: ConfigDict) -> Mesh:
    return sharding.make_mesh(config.mesh, config.train)


@pytest.mark.parametrize(
    ("data", "fsdp", "shape"), [(-1, 1, (8, 1)), (1, -1, (1, 8)), (-1, 4, (2, 4)), (2, 4, (2, 4)), (8, 1, (8, 1))]
)
def test_the_mesh_takes_all_devices(data: int, fsdp: int, shape: tuple[int, int]) -> None:
    mesh = _mesh(_config(data, fsdp))
    assert tuple(mesh.shape.values()) == (*shape, 1)
    assert len(set(mesh.devices.flat)) == 8


@pytest.mark.parametrize(("data", "fsdp"), [(3, 1), (-1, 3), (4, 1), (16, 1), (2, 2), (4, 4)])
def test_a_mesh_that_does_not_fit_is_refused(data: int, fsdp: int) -> None:
    with pytest.raises(UserError, match="does not fit 8 devices"):
        _mesh(_config(data, fsdp))


@pytest.mark.parametrize(("batch", "parts"), [(4, 1), (12, 1), (8, 2), (24, 2)])
def test_a_batch_that_does_not_divide_among_the_devices_is_refused(batch: int, parts: int) -> None:
    with pytest.raises(UserError, match=f"= {batch // parts} must be a multiple of the 8 devices"):
        _mesh(_config(-1, 1, batch, parts))


def test_a_batch_is_split_over_both_axes() -> None:
    mesh = sharding.mesh_of(data=2, fsdp=4)
    placed = jax.device_put(np.arange(16), jax.sharding.NamedSharding(mesh, sharding.BATCH))
    assert [shard.data.shape for shard in placed.addressable_shards] == [(2,)] * 8
    assert len({int(shard.data[0]) for shard in placed.addressable_shards}) == 8


@pytest.mark.parametrize("name", ["v5e:4x4", "v5p:2x2x4"])
@pytest.mark.parametrize(("data", "tensor"), [(1, 1), (4, 1), (1, 4)])
def test_the_processes_of_a_slice_hold_each_row_as_often_as_the_mesh_does(name: str, data: int, tensor: int) -> None:
    devices = topology.mesh(name, (16,), ("all",)).devices.ravel().tolist()
    mesh = sharding.mesh_of(data=data, fsdp=16 // (data * tensor), tensor=tensor, devices=devices)
    batch = NamedSharding(mesh, sharding.BATCH)
    rows = {process: sharding.rows_of_process(batch, 32, process) for process in range(4)}
    assert {row for mine in rows.values() for row in mine} == set(range(32))
    for device, (part,) in batch.devices_indices_map((32,)).items():
        assert set(range(*part.indices(32))) <= set(rows[device.process_index])
    if tensor == 1:
        assert sum(len(mine) for mine in rows.values()) == 32
    if (name, data, tensor) == ("v5e:4x4", 1, 1):  # not one block for each process
        assert rows[0] != tuple(range(8))
