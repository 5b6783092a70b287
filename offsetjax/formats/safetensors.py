"""The safetensors files that tensors come from and go to.

The safetensors library maps whole files into memory and writes from memory. Models here are larger than what a host can
spare, and lie on buckets too: tensors are read by ranges of bytes, and written one after the other.

An export has a checksum for each tensor (`crc32`), with which one is compared when it is read. Where a part alone is
asked for, as by one of several hosts that share it, the whole is read once more before the first.
"""

import math
import os
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from etils import epath

from offsetjax.errors import Status, TransientError, UserError, kind_of, one_line
from offsetjax.files import is_remote, storage_error
from offsetjax.formats import crc32
from offsetjax.formats.blocks import blocks, is_finite, is_floating
from offsetjax.formats.header import MAX_BYTES, Entry, format_header, parse_header
from offsetjax.formats.tensors import Index, Tensor, cast, whole_ranges

_AHEAD = 2  # tensors read while another is written
PICKLES = (".bin", ".ckpt", ".pt", ".pth")  # how files that are pickles are called
_PICKLE = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))  # how they begin, zipped or not
_POINTER = b"version "  # how a pointer of Git LFS begins, which a checkout without it has in place of a large file
_PIECE_BYTES = 1 << 26  # compared at a time


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

    def changed(self, names: Sequence[str]) -> UserError:
        """The message for tensors that are not as they were written."""
        shown = ", ".join(one_line(ValueError(name), 120) for name in names[:4])
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        differ = "differs" if len(names) == 1 else "differ"
        return UserError(
            f"{self.where}: {self.path} is damaged: {shown}{more} {differ} from the checksum in its header; "
            "export it again or restore it from a copy"
        )


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
    """The tensors of one safetensors file by name, and the metadata of its header but for the checksums.

    Raises:
        UserError: it is missing, damaged or none of this format; and when a tensor is read, that it has changed.
    """
    opened = _open(path, where)
    tensors = {entry.name: Tensor(entry.shape, entry.dtype, _reader(opened, entry)) for entry in opened.entries}
    return tensors, opened.metadata


def verify_file(path: epath.PathLike, where: str) -> int | None:
    """Reads a whole file and compares every tensor with its checksum; little of it is in memory at a time.

    Returns:
        The number of tensors; None if the file has no checksums, as those of other programs.

    Raises:
        UserError: it is missing, damaged or none of this format; or the names of tensors that have changed.
    """
    opened = _open(path, where)
    if opened.sums is None:
        return None
    damaged = [entry.name for entry in opened.entries if opened.crc_of(entry) != opened.sums[entry.name]]
    if damaged:
        raise opened.file.changed(damaged)
    return len(opened.entries)


@dataclass(frozen=True)
class _Opened:
    """A file whose header was read.

    Attributes:
        start: the byte at which the tensors begin.
        sums: the CRC-32 of each tensor by name; None where the file has none.
    """

    file: _File
    start: int
    entries: list[Entry]
    metadata: dict[str, str]
    sums: Mapping[str, int] | None

    def read(self, begin: int, end: int) -> np.ndarray:
        """The bytes from `begin` to before `end`, counted as an entry's are."""
        return self.file.read(self.start + begin, self.start + end)

    def crc_of(self, entry: Entry) -> int:
        """The CRC-32 of a tensor as it is now, read in pieces."""
        crc = crc32.begin(entry)
        for begin in range(entry.begin, entry.end, _PIECE_BYTES):
            crc = zlib.crc32(self.read(begin, min(begin + _PIECE_BYTES, entry.end)).data, crc)
        return crc


def _open(path: epath.PathLike, where: str) -> _Opened:
    """Raises UserError as `open_file` does."""
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
        header = file.read(8, start).tobytes()
        entries, metadata = parse_header(header)
        text = metadata.pop(crc32.KEY, None)
        sums = None if text is None or not header.endswith(crc32.ENDING) else crc32.parse_sums(text, entries)
    except ValueError as error:
        raise file.damaged(one_line(error)) from error
    end = start + (entries[-1].end if entries else 0)
    if size != end:
        raise file.damaged(f"it has {size} bytes, not {end}")
    return _Opened(file, start, entries, metadata, sums)


def read_metadata(path: epath.PathLike, where: str) -> dict[str, str]:
    """The metadata in a safetensors file's header.

    Raises:
        UserError: it is missing, damaged or none of this format.
    """
    return open_file(path, where)[1]


def _reader(opened: _Opened, entry: Entry) -> Callable[[Index], np.ndarray]:
    """Reads the rows of the first axis that an index asks for, and cuts the other axes in memory.

    The tensor is compared with its checksum, if there is one; before the first of its parts, as a whole.
    """
    is_compared = opened.sums is None

    def read(index: Index) -> np.ndarray:
        nonlocal is_compared
        ranges = whole_ranges(index, entry.shape)
        wanted = tuple(part.stop - part.start for part in ranges)
        if 0 in wanted:
            return np.empty(wanted, entry.dtype)
        first, *others = ranges or (slice(0, 1),)
        row_bytes = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        data = opened.read(entry.begin + first.start * row_bytes, entry.begin + first.stop * row_bytes)
        is_whole = len(data) == entry.end - entry.begin
        if opened.sums is not None and (is_whole or not is_compared):
            crc = zlib.crc32(data.data, crc32.begin(entry)) if is_whole else opened.crc_of(entry)
            if crc != opened.sums[entry.name]:
                raise opened.file.changed([entry.name])
            is_compared = True
        whole_rows = data.view(entry.dtype).reshape((*wanted[:1], *entry.shape[1:]))
        return whole_rows if whole_rows.shape == wanted else whole_rows[(slice(None), *others)].copy()

    return read


def write_tensors(
    file: epath.PathLike,
    tensors: Mapping[str, Tensor],
    *,
    dtype: str | None = None,
    metadata: Mapping[str, str] | None = None,
    has_checksums: bool = True,
) -> None:
    """Writes a safetensors file, one tensor after the other: at most four are in memory.

    Args:
        dtype: of the floating-point tensors in the file; None: each keeps its own.
        metadata: strings for the header.
        has_checksums: whether they are beside these; for a bucket, every tensor is then read twice.

    Raises:
        NotFiniteError: the name of a tensor with values that are not finite in the file's dtype.
        TransientError: on a bucket, that what was read changed meanwhile.
    """
    headed = converted(tensors, dtype)
    # The order of the safetensors library: the largest dtypes first, so that all are aligned.
    names = sorted(headed, key=lambda name: (-headed[name].dtype.itemsize, name))
    entries, end = [], 0
    for name in names:
        tensor = headed[name]
        entries.append(Entry(name, tensor.dtype, tensor.shape, end, end := end + tensor.nbytes))
    given = [tensors[name] for name in names]

    def header(sums: Sequence[int]) -> bytes:
        if not has_checksums:
            return format_header(entries, metadata or {})
        return format_header(entries, {**(metadata or {}), crc32.KEY: crc32.format_sums(sums)}, crc32.ENDING)

    # The checksums come before what they are of. A file is gone back into; an object of a bucket cannot be.
    is_twice = has_checksums and is_remote(file)
    sums = _copy(entries, given, lambda data: None) if is_twice else [0] * len(entries)
    with epath.Path(file).open("wb") as stream:
        _reserve(stream, file, len(header(sums)) + end)
        stream.write(header(sums))
        written = _copy(entries, given, stream.write)
        if has_checksums and not is_twice:
            stream.seek(0)
            stream.write(header(written))
        elif is_twice and written != sums:
            raise TransientError(f"{file}: its tensors were not the same when they were read again; try again")


def _copy(entries: Iterable[Entry], tensors: Iterable[Tensor], write: Callable[[memoryview], Any]) -> list[int]:
    """Gives the bytes of each tensor to `write`, in pieces; the CRC-32 of each.

    Raises:
        NotFiniteError: as for `write_tensors`.
    """
    sums = []
    for entry, array in zip(entries, _prefetched(tensors), strict=True):
        crc = crc32.begin(entry)
        for block in blocks(array, entry.dtype):
            if not is_finite(block):
                raise NotFiniteError(f"{entry.name} has values that are not finite in {entry.dtype.name}")
            data = block.reshape(-1).view(np.uint8).data
            write(data)
            crc = zlib.crc32(data, crc)
        sums.append(crc)
    return sums


def _reserve(stream: IO[bytes], file: epath.PathLike, size: int) -> None:
    """Room for the whole file, where it lies on a local disk: it is then written faster, and a full disk known first.

    Raises:
        StorageError: the disk has not so much left.
    """
    try:
        os.posix_fallocate(stream.fileno(), 0, size)
    except (AttributeError, OSError) as error:  # a remote file, or a system or a disk that cannot
        if isinstance(error, OSError) and kind_of(error) == Status.STORAGE:
            raise storage_error(file, error, size, "the file takes") from error


def converted(tensors: Mapping[str, Tensor], dtype: str | None) -> dict[str, Tensor]:
    """The floating-point tensors in another dtype, if one is given; the others as they are."""

    def convert(tensor: Tensor) -> Tensor:
        return cast(tensor, dtype) if dtype is not None and is_floating(tensor.dtype) else tensor

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
