"""Tokens are split over the devices of the tensor axis, and what comes out is the same."""

import pathlib
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offsetjax.models.z_image import ZImageTransformer
from offsetjax.parallel.sequence import split_over_devices
from offsetjax.parallel.sharding import mesh_of
from tests import tiny
from tests.models.test_z_image import LENGTHS, SMALL, inputs


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with tiny.quick_compilation(pathlib.Path(tmp_path_factory.getbasetemp())):
        yield


def test_tokens_are_split_where_there_are_devices_for_them_and_their_number_divides() -> None:
    x = jnp.arange(2 * 8 * 4, dtype=jnp.float32).reshape(2, 8, 4)
    split = jax.jit(lambda x: split_over_devices(jnp.sin(x)))
    with jax.set_mesh(mesh_of(data=1, fsdp=1, tensor=4)):
        assert split(x).sharding.shard_shape(x.shape) == (2, 2, 4)
        assert split(x[:, :6]).sharding.is_fully_replicated
    with jax.set_mesh(mesh_of(data=1, fsdp=4, tensor=1)):
        assert split(x).sharding.is_fully_replicated
    np.testing.assert_allclose(split(x), jnp.sin(x), rtol=1e-6)


def test_a_networks_blocks_keep_a_share_of_the_tokens_and_predict_the_same() -> None:
    network = ZImageTransformer(SMALL, jnp.float32)
    params = jax.tree.map(lambda leaf: leaf + 0.01, network.init(jax.random.key(0)))
    values = inputs(8, 12)
    alone = jax.jit(network.apply)(params, *values, LENGTHS)
    with jax.set_mesh(mesh_of(data=1, fsdp=1, tensor=2)):
        compiled = jax.jit(network.apply).lower(params, *values, LENGTHS).compile()
        together = compiled(params, *values, LENGTHS)
    np.testing.assert_allclose(together, alone, atol=1e-5 * np.abs(alone).max())
    # 32 tokens of the picture and 64 of the text, of 36 channels: each device adds to half of them.
    sums = re.findall(r"f32\[3,(\d+),36\]\S* add\(", compiled.as_text())
    assert "48" in sums
