"""Memory that is used again, without which making new pages takes most of the time of reading and writing tensors."""

import contextlib
import ctypes
from collections.abc import Iterator

# Of glibc's malloc.h, with the values that it begins with.
_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES = -1, 128 * 1024
_MMAP_MAX, _MMAP_MAX_BLOCKS = -4, 65536


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside, what is freed stays with this process for what is needed next; glibc gives large blocks back at once.

    Where the C library is another, nothing changes.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        yield
        return
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        library.mallopt(_MMAP_MAX, _MMAP_MAX_BLOCKS)
        library.mallopt(_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES)
        library.malloc_trim(0)
