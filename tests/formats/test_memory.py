"""What is freed is used again inside, and given back afterwards."""

import pathlib
import resource
import sys

import numpy as np
import pytest

from offsetjax.formats.memory import freed_memory_kept

ROUNDS, ELEMENTS = 20, 1 << 21


def new_pages() -> int:
    """Pages that were made for so many arrays of 16 MB, one after the other."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(ROUNDS):
        np.ones(ELEMENTS)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def held() -> int:
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the memory in use")
def test_new_pages_are_made_once_and_given_back() -> None:
    size = 8 * ELEMENTS
    before = held()
    with freed_memory_kept():
        once = new_pages()
        again = new_pages()
        arrays = [np.ones(ELEMENTS) for _ in range(10)]
        del arrays
        assert held() > before + 9 * size
    assert held() < before + 2 * size
    assert again < 0.1 * max(once, size / resource.getpagesize())
