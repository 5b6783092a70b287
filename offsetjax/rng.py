"""Named streams of randomness: every draw is a function of (seed, name, step, example).

No random state is carried, split or saved. A run that resumes at step 1,000 draws what an uninterrupted one draws
there, whatever the number of devices, since an example is known by its place in the global batch.
"""

import zlib

import jax
from jaxtyping import Array, Int, Key


def stream_key(seed: int, name: str, step: int | Int[Array, ""] = 0) -> Key[Array, ""]:
    """The key of the stream `name` at `step`; a new name is a new, independent stream."""
    # CRC-32 rather than hash(): Python salts the latter anew in each process.
    named = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    return jax.random.fold_in(named, step)
