"""Host batches to global arrays on the devices, ahead of their use."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from offsetjax.parallel.sharding import rows_of_process

# What stays with the host of a batch; the step takes the rest.
HOST_FIELDS = ("index",)


def on_devices(
    batches: Iterator[dict[str, np.ndarray]], sharding: NamedSharding, global_batch_size: int, ahead: int = 2
) -> Iterator[dict[str, jax.Array]]:
    """The batches as global arrays, `ahead` of them on their way.

    Args:
        batches: of each batch the rows that this process holds (`sharding.rows_of_process`).
    """
    rows = rows_of_process(sharding, global_batch_size)

    def whole(field: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(global_batch_size)
            return field[rows.index(first) :][: last - first]

        return jax.make_array_from_callback((global_batch_size, *field.shape[1:]), sharding, part)

    def put(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return {name: jax.tree.map(whole, field) for name, field in batch.items() if name not in HOST_FIELDS}

    queue: deque[dict[str, jax.Array]] = deque()
    for batch in batches:
        queue.append(put(batch))
        if len(queue) > ahead:
            yield queue.popleft()
    yield from queue
