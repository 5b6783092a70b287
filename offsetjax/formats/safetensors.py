"""The safetensors files that tensors come from and go to.

The safetensors library maps whole files into memory and writes from memory. Models here are larger than what a host can
spare, and lie on buckets too: tensors are read by ranges of bytes, and written one after the other.
"""

import errno
import math
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any

import numpy as np
from etils import epath

from offsetjax.errors import UserError, one_line
from offsetjax.formats.header import MAX_BYTES, Entry, format_header, parse_header
from offsetjax.formats.tensors import Index, Tensor, cast, whole_ranges

_AHEAD = 2  # tensors read while another is written
PICKLES = (".bin", ".ckpt", ".pt", ".pth")  # how files that are pickles are called
_PICKLE = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))  # how they begin, zipped or not
_POINTER = b"version "  # how a pointer of Git LFS begins, which a checkout without it has in place of a large file
_BLOCK_BYTES = 1 << 21  # written in one call
_TILE = 64  # columns transposed at once


class NotFiniteError(ValueError):
    """A tensor has values that are infinite, or no numbers, in the dtype in which it is to be written."""


class _File:
    """A file that several threads read from: each takes an open handle that no other uses, or opens one."""

    def __init__(self, path: epath.Path, where: str):
        self.path, self.where = path, where
        self._idle: list[IO[bytes]] = []
        weakref.finalize(self, _close, self._idle)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The bytes from `start` to before `stop`."""
        buffer = np.empty(stop - start, np.uint8)
        try:
            handle: Any = self._idle.pop()
        except IndexError:
            handle = self.path.open("rb")
        try:
            handle.seek(start)
            rest = buffer.data
            while rest:
                count = handle.readinto(rest)
                if not count:
                    raise self.damaged("it ends early")
                rest = rest[count:]
        finally:
            self._idle.append(handle)
        return buffer

    def damaged(self, what: str) -> UserError:
        """The message for the user."""
        return UserError(f"{self.where}: {self.path} is damaged ({what}); fetch it again")


def _close(handles: list[IO[bytes]]) -> None:
    for handle in handles:
        handle.close()


def open_tensors(files: Sequence[epath.PathLike], where: str) -> dict[str, Tensor]:
    """The tensors of safetensors files, local or remote, by name; only the headers are read.

    Args:
        where: what an error begins with: the field of the config that named the files.

    Raises:
        UserError: a file is missing, damaged or none of this format.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        found, _ = open_file(file, where)
        for name in found:
            if name in tensors:
                raise UserError(f"{where}: {name} is in {file} and in another file too; fetch the directory again")
        tensors |= found
    return tensors


def open_file(path: epath.PathLike, where: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of one safetensors file by name, and the metadata of its header.

    Raises:
        UserError: it is missing, damaged or none of this format.
    """
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"{where}: {path} is missing")
    if path.is_dir():
        raise UserError(f"{where}: {path} is a directory, not a safetensors file")
    file, size = _File(path, where), path.stat().length
    length = file.read(0, min(8, size)).tobytes()
    if length == _POINTER:
        raise UserError(f"{where}: {path} is a pointer of Git LFS, not the file itself; fetch that with `git lfs pull`")
    start = 8 + int.from_bytes(length, "little")
    if size < 8 or start > min(size, MAX_BYTES):
        if length.startswith(_PICKLE):
            raise UserError(
                f"{where}: {path} is a pickle, which can run code, whatever its name; fetch it as safetensors, or "
                "convert it"
            )
        raise file.damaged(f"it has {size} bytes" if size < 8 else f"its header would have {start - 8} bytes")
    try:
        entries, metadata = parse_header(file.read(8, start).tobytes())
    except ValueError as error:
        raise file.damaged(one_line(error)) from error
    end = start + (entries[-1].end if entries else 0)
    if size != end:
        raise file.damaged(f"it has {size} bytes, not {end}")
    return {entry.name: Tensor(entry.shape, entry.dtype, _reader(file, start, entry)) for entry in entries}, metadata


def read_metadata(path: epath.PathLike, where: str) -> dict[str, str]:
    """The metadata in a safetensors file's header.

    Raises:
        UserError: it is missing, damaged or none of this format.
    """
    return open_file(path, where)[1]


def _reader(file: _File, start: int, entry: Entry) -> Callable[[Index], np.ndarray]:
    """Reads the rows of the first axis that an index asks for, and cuts the other axes in memory."""

    def read(index: Index) -> np.ndarray:
        ranges = whole_ranges(index, entry.shape)
        wanted = tuple(part.stop - part.start for part in ranges)
        if 0 in wanted:
            return np.empty(wanted, entry.dtype)
        first, *others = ranges or (slice(0, 1),)
        row_bytes = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        begin = start + entry.begin
        data = file.read(begin + first.start * row_bytes, begin + first.stop * row_bytes).view(entry.dtype)
        whole_rows = data.reshape((*wanted[:1], *entry.shape[1:]))
        return whole_rows if whole_rows.shape == wanted else whole_rows[(slice(None), *others)].copy()

    return read


def write_tensors(
    file: epath.PathLike,
    tensors: Mapping[str, Tensor],
    *,
    dtype: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file, one tensor after the other: at most four are in memory.

    Args:
        dtype: of the floating-point tensors in the file; None: each keeps its own.
        metadata: strings for the header.

    Raises:
        NotFiniteError: the name of a tensor with values that are not finite in the file's dtype.
    """
    headed = converted(tensors, dtype)
    # The order of the safetensors library: the largest dtypes first, so that all are aligned.
    names = sorted(headed, key=lambda name: (-headed[name].dtype.itemsize, name))
    entries, end = [], 0
    for name in names:
        tensor = headed[name]
        entries.append(Entry(name, tensor.dtype, tensor.shape, end, end := end + tensor.nbytes))
    header = format_header(entries, metadata or {})
    with epath.Path(file).open("wb") as stream:
        _reserve(stream, len(header) + end)
        stream.write(header)
        for entry, array in zip(entries, _prefetched(tensors[name] for name in names), strict=True):
            for block in _blocks(array, entry.dtype):
                if not _is_finite(block):
                    raise NotFiniteError(f"{entry.name} has values that are not finite in {entry.dtype.name}")
                stream.write(block.reshape(-1).view(np.uint8).data)


def _reserve(stream: IO[bytes], size: int) -> None:
    """Room for the whole file, where it lies on a local disk: it is then written faster, and a full disk known first.

    Raises:
        OSError: the disk has not so much left.
    """
    try:
        os.posix_fallocate(stream.fileno(), 0, size)
    except (AttributeError, OSError) as error:  # a remote file, or a system or a disk that cannot
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise


def _is_finite(block: np.ndarray) -> bool:
    """Whether no value is infinite or no number: these alone have all the bits of infinity's exponent.

    By the bits, for numpy is slow at 16-bit numbers.
    """
    if not _is_floating(block.dtype):
        return True
    bits = np.dtype(f"u{block.dtype.itemsize}")
    infinity = np.array(np.inf, block.dtype).view(bits)
    return bool((block.view(bits) & infinity).max() != infinity)


def _is_floating(dtype: np.dtype) -> bool:
    return dtype.name.startswith(("float", "bfloat"))


def converted(tensors: Mapping[str, Tensor], dtype: str | None) -> dict[str, Tensor]:
    """The floating-point tensors in another dtype, if one is given; the others as they are."""

    def convert(tensor: Tensor) -> Tensor:
        return cast(tensor, dtype) if dtype is not None and _is_floating(tensor.dtype) else tensor

    return {name: convert(tensor) for name, tensor in tensors.items()}


def _prefetched(tensors: Iterable[Tensor]) -> Iterator[np.ndarray]:
    """Each array; while it is used, the next two are read."""

    with ThreadPoolExecutor(_AHEAD) as background:
        pending: deque[Future[np.ndarray]] = deque()
        for tensor in tensors:
            pending.append(background.submit(tensor))
            if len(pending) > _AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _blocks(array: np.ndarray, dtype: np.dtype) -> Iterator[np.ndarray]:
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
