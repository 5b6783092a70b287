"""Lazy tensors: shape and type are known, values are read when asked for."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Index = tuple[slice, ...]


@dataclass(frozen=True)
class Tensor:
    """A lazy tensor.

    Attributes:
        read: gives a part of it, by a slice for each axis (those left out are whole), and reads little more than that.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]

    def __call__(self) -> np.ndarray:
        """The whole array."""
        return self.read(())

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.size * self.dtype.itemsize


def of_array(array: Any) -> Tensor:
    """A tensor of what is in memory already: a numpy array, or what becomes one."""

    def read(index: Index) -> np.ndarray:
        ranges: Any = (..., *whole_ranges(index, array.shape))  # with the ellipsis, no axes stay an array
        return np.asarray(array)[ranges]

    return Tensor(tuple(array.shape), np.dtype(array.dtype), read)


def transposed(tensor: Tensor, axes: Sequence[int]) -> Tensor:
    """The axes in another order, as in `np.transpose`."""
    shape = tuple(tensor.shape[axis] for axis in axes)

    def read(index: Index) -> np.ndarray:
        ranges = dict(zip(axes, whole_ranges(index, shape), strict=True))
        return tensor.read(tuple(ranges[axis] for axis in range(len(axes)))).transpose(axes)

    return Tensor(shape, tensor.dtype, read)


def with_ndim(tensor: Tensor, ndim: int) -> Tensor:
    """Trailing axes of length 1 added or removed, until there are `ndim`: a 1x1 convolution's weight, or a matrix."""
    given = len(tensor.shape)
    if any(length != 1 for length in tensor.shape[ndim:]):
        raise ValueError(f"shape {tensor.shape} has more than {ndim} axes that are not of length 1")
    shape = tensor.shape[:ndim] + (1,) * (ndim - given)

    def read(index: Index) -> np.ndarray:
        ranges = whole_ranges(index, shape)
        array = tensor.read(ranges[:given])
        array = array.reshape(array.shape[:ndim] + (1,) * (ndim - given))
        added: Any = (..., *ranges[given:])
        return array[added] if ndim > given else array

    return Tensor(shape, tensor.dtype, read)


def rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    """A range of the first axis."""

    def read(index: Index) -> np.ndarray:
        first, *others = whole_ranges(index, shape)
        return tensor.read((slice(start + first.start, start + first.stop), *others))

    shape = (stop - start, *tensor.shape[1:])
    return Tensor(shape, tensor.dtype, read)


def concatenated(tensors: Sequence[Tensor]) -> Tensor:
    """One after the other along the first axis."""
    starts = np.cumsum([0, *(tensor.shape[0] for tensor in tensors)]).tolist()
    shape = (starts[-1], *tensors[0].shape[1:])

    def read(index: Index) -> np.ndarray:
        first, *others = whole_ranges(index, shape)
        parts = []
        for tensor, start in zip(tensors, starts, strict=False):
            low, high = max(first.start - start, 0), min(first.stop - start, tensor.shape[0])
            if low < high:
                parts.append(tensor.read((slice(low, high), *others)))
        return np.concatenate(parts or [tensors[0].read((slice(0, 0), *others))])

    return Tensor(shape, tensors[0].dtype, read)


def cast(tensor: Tensor, dtype: Any) -> Tensor:
    """The values in another dtype."""
    dtype = np.dtype(dtype)

    def read(index: Index) -> np.ndarray:
        with np.errstate(over="ignore"):  # what becomes infinite is found when it is written
            return tensor.read(index).astype(dtype, copy=False)

    return Tensor(tensor.shape, dtype, read)


def inspected(tensor: Tensor, see: Callable[[np.ndarray], None]) -> Tensor:
    """The same; `see` is called with each array that is read of it."""

    def read(index: Index) -> np.ndarray:
        array = tensor.read(index)
        see(array)
        return array

    return Tensor(tensor.shape, tensor.dtype, read)


def whole_ranges(index: Index, shape: tuple[int, ...]) -> Index:
    """A slice for each axis, with its bounds as numbers."""
    index = (*index, *(slice(None),) * (len(shape) - len(index)))
    bounds = [part.indices(length) for part, length in zip(index, shape, strict=True)]
    if any(step != 1 for _, _, step in bounds):
        raise ValueError(f"only ranges can be read, not {index}")
    return tuple(slice(start, max(start, stop)) for start, stop, _ in bounds)
