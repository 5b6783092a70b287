"""Host batches to global arrays on the devices, ahead of their use."""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from offsetjax.parallel.sharding import rows_of_process

# What stays with the host of a batch; the step takes the rest.
HOST_FIELDS = ("index",)


def on_devices(
    batches: Iterator[dict[str, Any]], sharding: NamedSharding, whole_size: int | Callable[[int], int], ahead: int = 2
) -> Iterator[dict[str, jax.Array]]:
    """The batches as global arrays, `ahead` of them on their way.

    Args:
        batches: of each batch the rows that this process holds (`sharding.rows_of_process`).
        whole_size: how many examples a batch has over all processes, which may depend on how many are of this one.
    """
    rows_of = functools.cache(functools.partial(rows_of_process, sharding))

    def put(batch: dict[str, Any]) -> dict[str, jax.Array]:
        size = whole_size(len(batch["index"])) if callable(whole_size) else whole_size
        rows = rows_of(size)

        def whole(field: np.ndarray) -> jax.Array:
            def part(index: Any) -> np.ndarray:
                first, last, _ = index[0].indices(size)
                return field[rows.index(first) :][: last - first]

            return jax.make_array_from_callback((size, *field.shape[1:]), sharding, part)

        return {name: jax.tree.map(whole, field) for name, field in batch.items() if name not in HOST_FIELDS}

    queue: deque[dict[str, jax.Array]] = deque()
    for batch in batches:
        queue.append(put(batch))
        if len(queue) > ahead:
            yield queue.popleft()
    yield from queue


def in_steps(batches: Iterator[dict[str, jax.Array]], parts: int) -> Iterator[Any]:
    """What a step takes: a batch, or, where batches have parts of different sizes, a tuple of these."""
    if parts == 1:
        yield from batches
        return
    while taken := tuple(itertools.islice(batches, parts)):
        yield taken
