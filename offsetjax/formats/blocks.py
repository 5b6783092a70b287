"""Arrays in pieces, as they are converted and written."""

import math
from collections.abc import Iterator

import numpy as np

_BLOCK_BYTES = 1 << 21  # written in one call
_TILE = 64  # columns transposed at once


def blocks(array: np.ndarray, dtype: np.dtype) -> Iterator[np.ndarray]:
    """An array's elements in C order and in a dtype, in pieces that stay in a core's cache until they are written.

    Transposing and converting a whole array would write it to memory and read it back once more, to pages that have to
    be made for it; a piece is valid until the next is asked for.
    """
    if array.ndim < 2 or (array.flags.c_contiguous and array.dtype == dtype):
        array = array.reshape(-1)
    rows = max(1, _BLOCK_BYTES // max(1, math.prod(array.shape[1:]) * dtype.itemsize))
    scratch = np.empty((min(rows, len(array)), *array.shape[1:]), dtype)
    for begin in range(0, len(array), rows):
        piece = array[begin : begin + rows]
        if piece.flags.c_contiguous and piece.dtype == dtype:
            yield piece
            continue
        block = scratch[: len(piece)]
        for column in range(0, piece.shape[1] if piece.ndim > 1 else 1, _TILE):  # numpy alone copies row by row
            tile = (slice(None), slice(column, column + _TILE))[: piece.ndim]
            with np.errstate(over="ignore"):  # infinity is found when it is written
                np.copyto(block[tile], piece[tile], casting="unsafe")
        yield block


def is_finite(block: np.ndarray) -> bool:
    """Whether no value is infinite or no number: these alone have all the bits of infinity's exponent.

    By the bits, for numpy is slow at 16-bit numbers.
    """
    if not is_floating(block.dtype):
        return True
    bits = np.dtype(f"u{block.dtype.itemsize}")
    infinity = np.array(np.inf, block.dtype).view(bits)
    return bool((block.view(bits) & infinity).max() != infinity)


def is_floating(dtype: np.dtype) -> bool:
    return dtype.name.startswith(("float", "bfloat"))
