"""Host batches to global arrays on the devices, ahead of their use."""

from collections import deque
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import NamedSharding

# What the step takes of a batch; the rest stays with the host.
FIELDS = ("pixels", "input_ids", "time_ids", "is_truncated")


def on_devices(
    batches: Iterator[dict[str, np.ndarray]], sharding: NamedSharding, ahead: int = 2
) -> Iterator[dict[str, jax.Array]]:
    """The batches as global arrays, `ahead` of them on their way; each process gives its own block of each batch."""

    def put(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        fields = {name: batch[name] for name in FIELDS}
        return {name: jax.make_array_from_process_local_data(sharding, field) for name, field in fields.items()}

    queue: deque[dict[str, jax.Array]] = deque()
    for batch in batches:
        queue.append(put(batch))
        if len(queue) > ahead:
            yield queue.popleft()
    yield from queue
