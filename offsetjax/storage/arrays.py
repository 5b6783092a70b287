"""The arrays of a checkpoint one by one: what export reads, and what `offsetjax checkpoint verify` compares.

Nothing else of the checkpoint is read; an array is compared with its checksum from when it was written, also where only
a part of it is asked for: it is then read once more, as a whole, before the first.
"""

from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from jaxtyping import PyTree

from offsetjax.formats.tensors import Tensor
from offsetjax.json_text import parse_object
from offsetjax.storage import checksums
from offsetjax.storage.checkpoint import STATE, existing_step, read_data, tried


def open_part(manager: ocp.CheckpointManager, name: str, like: PyTree, step: int | None = None) -> PyTree:
    """One field of the state as lazy tensors, in the structure of `like` (abstract arrays).

    Raises:
        UserError: no such step; and when one is read, that it cannot be, or has changed since it was written.
    """
    step = existing_step(manager, step)
    arrays = _Arrays(manager, step)

    def open_array(path: tuple[Any, ...], like: jax.ShapeDtypeStruct) -> Tensor:
        keys = [name, *(str(each.key) for each in path)]

        def read(index: tuple[Any, ...]) -> np.ndarray:
            return arrays.read(keys, index, like.shape)

        return Tensor(tuple(like.shape), np.dtype(like.dtype), read)

    return jax.tree_util.tree_map_with_path(open_array, like)


def verify(manager: ocp.CheckpointManager, step: int) -> int:
    """Reads every array of a step and compares it with its checksum; returns their number.

    Raises:
        UnreadableError: one that cannot be read or has changed, or the data position.
        TransientError: it could not be read, which may pass.
    """
    arrays = _Arrays(manager, step)
    for name in arrays.checksums:
        arrays.read(name.split("/"))
    return len(arrays.checksums)


class _Arrays:
    """The arrays of a step's state, read one by one: orbax's form on disk is zarr in an OCDBT database."""

    def __init__(self, manager: ocp.CheckpointManager, step: int) -> None:
        self._manager, self._step = manager, step
        self._folder = manager.directory / str(step) / STATE
        self._context = tensorstore.Context()  # the database's index is read once
        self._compared = set[str]()
        self.checksums: dict[str, int] = read_data(manager, step)["checksums"]
        metadata = tried(manager, step, lambda: parse_object((self._folder / "_METADATA").read_bytes()))
        self._driver = "zarr3" if metadata.get("use_zarr3", False) else "zarr"

    def read(self, keys: list[str], index: tuple[Any, ...] = (), shape: tuple[int, ...] | None = None) -> np.ndarray:
        """An array, or a part of it, compared with its checksum.

        Args:
            shape: that of the whole array, if known.

        Raises:
            UserError: it cannot be read, has another shape or has changed since it was written.
        """
        kvstore = {"driver": "ocdbt", "base": _kvstore(self._folder), "path": ".".join(keys) + "/"}
        name = "/".join(keys)

        def fetch() -> np.ndarray:
            spec = {"driver": self._driver, "kvstore": kvstore}
            stored = tensorstore.open(spec, open=True, read=True, context=self._context).result()
            if shape is not None and stored.shape != shape:
                raise ValueError(f"{name} has shape {stored.shape}, not {shape}")
            array = stored[(*index, ...)].read().result()
            if array.shape == stored.shape:
                checksums.check_array(array, self.checksums[name], name)
            elif name not in self._compared:  # a part has no checksum of its own
                checksums.check_rows(
                    lambda rows: stored[rows].read().result(), stored.shape, self.checksums[name], name
                )
            self._compared.add(name)
            return array

        return tried(self._manager, self._step, fetch)


def _kvstore(folder: epath.Path) -> dict[str, str]:
    """A folder for TensorStore; not as a URL, in which a folder called `hash#1` would be another."""
    if str(folder).startswith("gs://"):
        bucket, _, path = str(folder).removeprefix("gs://").partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": f"{path}/"}
    return {"driver": "file", "path": f"{folder}/"}
