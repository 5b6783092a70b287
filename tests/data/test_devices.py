"""Batches reach the devices whole, in their order, and without what is the host's alone."""

import itertools
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from offsetjax.data.devices import on_devices


def batches(num_encoders: int, num_tokens: int) -> Iterator[dict[str, np.ndarray]]:
    for number in itertools.count():
        yield {
            "pixels": np.full((8, 4, 4, 3), number, np.uint8),
            "input_ids": np.full((8, num_encoders, num_tokens), number, np.int32),
            "time_ids": np.full((8, 6), number + 0.5, np.float32),
            "is_truncated": np.zeros(8, bool),
            "index": np.arange(8),
        }


@pytest.mark.parametrize(("num_encoders", "num_tokens"), [(2, 5), (0, 0)])  # none: an autoencoder reads no captions
def test_each_device_has_its_block_of_each_batch(num_encoders: int, num_tokens: int) -> None:
    sharding = NamedSharding(jax.make_mesh((8,), ("data",)), P("data"))
    given = list(itertools.islice(batches(num_encoders, num_tokens), 5))
    arrived = list(on_devices(iter(given), sharding))
    assert len(arrived) == 5
    for host, device in zip(given, arrived, strict=True):
        assert set(device) == set(host) - {"index"}
        for name, array in device.items():
            assert array.sharding == sharding and array.dtype == host[name].dtype
            np.testing.assert_array_equal(array, host[name])
