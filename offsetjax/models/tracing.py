"""How a network is traced in training: its attention's kernel, what is computed again, which layers are loops."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from offsetjax.models.blocks import Blocks
from offsetjax.models.remat import rematerialised
from offsetjax.models.scan import scanned


@dataclass(frozen=True)
class Tracing:
    """How a network is traced; by default as it is drawn with.

    Attributes:
        kernel: of attention (`attention.py`); one other than "xla" needs each device to trace for itself.
        remat: what the backward pass computes again (`remat.py`).
        is_scanned: whether layers that repeat are one loop (`scan.py`).
        trained: the names of the arrays that are, where not all are (`lora.py`).
    """

    kernel: str = "xla"
    remat: str = "none"
    is_scanned: bool = False
    trained: tuple[str, ...] | None = None


PLAIN = Tracing()


@contextlib.contextmanager
def traced(blocks: Blocks, tracing: Tracing) -> Iterator[None]:
    """A context in which a network's `apply` is traced as training asks; the kernel is the network's own affair."""
    loops = scanned(blocks, tracing.remat) if tracing.is_scanned else contextlib.nullcontext()
    with loops, rematerialised(blocks, tracing.remat, tracing.trained):
        yield
