"""Batches reach the devices whole, in their order, and without what is the host's alone."""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from offsetjax.data.devices import on_devices
from offsetjax.parallel.sharding import AXES, BATCH, rows_of_process
from tests.processes import call_together


def batches(num_tokens: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    for number in itertools.count():
        yield {
            "pixels": np.full((8, 4, 4, 3), number, np.uint8),
            "input_ids": {f"text_{place}": np.full((8, n), number, np.int32) for place, n in enumerate(num_tokens)},
            "time_ids": np.full((8, 6), number + 0.5, np.float32),
            "is_truncated": np.zeros(8, bool),
            "index": np.arange(8),
        }


@pytest.mark.parametrize("num_tokens", [(5, 5), (5, 3), ()])  # none: an autoencoder reads no captions
def test_each_device_has_its_block_of_each_batch(num_tokens: tuple[int, ...]) -> None:
    sharding = NamedSharding(jax.make_mesh((8,), ("data",)), P("data"))
    given = list(itertools.islice(batches(num_tokens), 5))
    arrived = list(on_devices(iter(given), sharding, 8))
    assert len(arrived) == 5
    for host, device in zip(given, arrived, strict=True):
        assert set(device) == set(host) - {"index"}
        assert jax.tree.structure(device) == jax.tree.structure({name: host[name] for name in device})
        given_arrays = jax.tree.leaves({name: host[name] for name in device})
        for array, given_array in zip(jax.tree.leaves(device), given_arrays, strict=True):
            assert array.sharding == sharding and array.dtype == given_array.dtype
            np.testing.assert_array_equal(array, given_array)


def _rows_on_devices(order: tuple[int, ...], shape: tuple[int, int, int]) -> tuple[tuple[int, ...], list[bool]]:
    """This process's rows, and whether each of its devices has those of its place in the mesh."""
    mesh = Mesh(np.array(jax.devices())[list(order)].reshape(shape), AXES)
    sharding = NamedSharding(mesh, BATCH)
    rows = rows_of_process(sharding, 8)
    fields = {name: np.array(rows, np.int32) for name in ("pixels", "input_ids", "time_ids", "is_truncated")}
    [batch] = on_devices(iter([fields]), sharding, 8)
    shards = batch["pixels"].addressable_shards
    return rows, [np.array_equal(each.data, np.arange(8)[each.index]) for each in shards]


@pytest.mark.parametrize(
    ("order", "shape", "rows"),
    [
        ((0, 2, 1, 3), (2, 2, 1), ((0, 1, 4, 5), (2, 3, 6, 7))),  # as on a torus, whose lines pass from host to host
        ((0, 2, 1, 3), (2, 1, 2), (tuple(range(8)),) * 2),  # the two devices of a row's `tensor` are of two hosts
    ],
)
def test_the_rows_of_a_batch_are_where_the_mesh_has_them(
    order: tuple[int, ...], shape: tuple[int, int, int], rows: tuple[tuple[int, ...], ...]
) -> None:
    found = call_together([(_rows_on_devices, order, shape)] * 2, num_devices=2)
    assert tuple(each for each, _ in found) == rows
    assert all(all(placed) for _, placed in found)
