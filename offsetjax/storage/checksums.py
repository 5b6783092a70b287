"""Checksums of arrays, the same on any mesh: storage that changes a bit is found out.

    c = Σ_i w_i · m_i  mod 2³²,   m_i = (i · 0x9E3779B1 mod 2³²) | 1

over the array's 32-bit words w in row-major order (16-bit numbers count as one word each). A changed word changes c,
for every m_i is odd; several cancel with a chance of 2⁻³². It is multilinear hashing with fixed multipliers (D. Lemire
and O. Kaser, "Strongly universal string hashing is fast", arXiv 1202.4961), against accidents, not attackers.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, UInt32

_MULTIPLIER = 0x9E3779B1
_BLOCK = 1 << 20  # words at a time: their multipliers stay in a core's cache
_ROWS_ELEMENTS = 1 << 24  # of an array that is read by parts, at a time


def of_tree(tree: PyTree) -> dict[str, int]:
    """The checksum of every array of a tree, by its path, such as `params/unet/conv_in/kernel`."""
    # One after the other: hundreds of sums over several devices under way at once wait for each other for ever on CPUs.
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): int(_of_device_array(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def digest(tree: PyTree) -> str:
    """One checksum of all arrays of a tree and their names, in hexadecimal."""
    return hashlib.sha256(json.dumps(of_tree(tree), sort_keys=True).encode()).hexdigest()[:16]


def check(tree: PyTree, expected: Mapping[str, int]) -> None:
    """Compares a tree, or a part of the one that was written, with its checksums.

    Raises:
        ValueError: the name of an array that has changed.
    """
    for name, value in of_tree(tree).items():
        _compare(name, value, expected[name])


def check_array(array: np.ndarray, expected: int, name: str) -> None:
    """The same for one array on the host."""
    _compare(name, of_array(array), expected)


def check_rows(read: Callable[[slice], np.ndarray], shape: tuple[int, ...], expected: int, name: str) -> None:
    """The same for one that is too large to be read at once.

    Args:
        read: gives a range of the first axis.
    """
    row = math.prod(shape[1:])
    count = max(1, _ROWS_ELEMENTS // max(1, row))
    parts = (slice(first, min(first + count, shape[0])) for first in range(0, shape[0], count))
    _compare(name, sum(of_array(read(part), part.start * row) for part in parts) % 2**32, expected)


def _compare(name: str, found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(f"{name} is damaged: its checksum is {found:08x}, not {expected:08x}")


@jax.jit
def _of_device_array(array: Array) -> UInt32[Array, ""]:
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
    # The place in the whole array, whatever part of it a device holds.
    place = jnp.zeros(array.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(array.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= array.shape[axis]
    multipliers = place * jnp.uint32(_MULTIPLIER) | 1
    return (bits.astype(jnp.uint32) * multipliers).sum(dtype=jnp.uint32)


def of_array(array: np.ndarray, start: int = 0) -> int:
    """The checksum of an array on the host, or what a part of one adds to it.

    Args:
        start: the place of the part's first element in the whole; all parts together are the whole, in its order.
    """
    words = np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")
    steps = np.arange(min(_BLOCK, len(words)), dtype=np.uint32) * np.uint32(_MULTIPLIER)
    total = 0
    for begin in range(0, len(words), _BLOCK):
        block = words[begin : begin + _BLOCK].astype(np.uint32, copy=False)
        first = np.uint32((start + begin) * _MULTIPLIER % 2**32)
        total += int(np.dot(block, (steps[: len(block)] + first) | np.uint32(1)))
    return total % 2**32
