"""Weights: a pretrained model's straight into their shards, and those that a run does not change onto its disk.

A run keeps its frozen parts in `frozen/`, in diffusers' form and in the type in which they came, so that nothing
outside its work directory is needed to resume, sample or export, and what was imported can be exported bit for bit.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from offsetjax.errors import UserError
from offsetjax.files import write_whole
from offsetjax.formats import diffusers as files
from offsetjax.formats.names import flax_tensors
from offsetjax.formats.safetensors import NotFiniteError, open_tensors, write_tensors
from offsetjax.formats.tensors import Tensor, inspected
from offsetjax.json_text import parse_object
from offsetjax.models.family import Family
from offsetjax.models.pipeline import Pipeline
from offsetjax.storage import checksums, digests

CARRIED_FILE = "carried.safetensors"
_CHECKSUMS_FILE = "checksums.json"  # of the arrays of the frozen parts, by part and PyTorch's name


@dataclass(frozen=True)
class _Described:
    """A model that is known by what it says of itself."""

    text: str
    model: Any = field(compare=False)


@functools.lru_cache(maxsize=32)
def _abstract(described: _Described) -> PyTree:
    return jax.eval_shape(described.model.init, jax.random.key(0))


def abstract_params(model: Any) -> PyTree:
    """The shapes of a part's parameters; remembered, for tracing a denoiser takes seconds.

    Raises:
        UserError: the configuration is of no such network.
    """
    try:
        return _abstract(_Described(repr(model), model))
    except UserError:
        raise
    except Exception as error:  # Flax and jax raise several kinds
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"model: no {model.class_name} can be built of its configuration ({first[:160]}); see the config's model "
            "section, and the config.json of model.pretrained"
        ) from error


def load(tensors: PyTree, shardings: PyTree, dtype: Any) -> PyTree:
    """Tensors that are not read yet, each straight into its shards: a process reads what its devices hold.

    Args:
        tensors: a tree of `formats.tensors.Tensor`, in Flax's layout.
        shardings: one for each.
        dtype: of the arrays.
    """

    def place(tensor: Tensor, sharding: NamedSharding) -> jax.Array:
        # Devices that hold the same part share one reading. Several parts are cut from the whole where they make up
        # most of it: a part of the columns cannot be read from a file without its rows.
        held = {_bounds(index) for index in sharding.addressable_devices_indices_map(tensor.shape).values()}
        is_mostly_held = len(held) > 1 and 2 * len(held) * math.prod(sharding.shard_shape(tensor.shape)) > tensor.size
        whole = tensor() if is_mostly_held else None
        read: dict[Any, np.ndarray] = {}

        def part(index: Any) -> np.ndarray:
            if (bounds := _bounds(index)) not in read:
                array = tensor.read(index) if whole is None else whole[index]
                read[bounds] = np.asarray(array).astype(dtype, copy=False)
            return read[bounds]

        return jax.make_array_from_callback(tensor.shape, sharding, part, dtype=jnp.dtype(dtype))

    return jax.tree.map(place, tensors, shardings)


def _bounds(index: Any) -> tuple[tuple[int | None, int | None], ...]:
    """A tuple of slices as what can be a key."""
    return tuple((each.start, each.stop) for each in index)


def on_host(tensors: PyTree) -> PyTree:
    """Tensors that are not read yet, as float32 arrays on the host."""
    return jax.tree.map(lambda tensor: np.asarray(tensor(), np.float32), tensors)


def write_frozen(
    directory: epath.PathLike,
    pipeline: Pipeline,
    tensors: Mapping[str, Mapping[str, Tensor]],
    carried: Mapping[str, Tensor],
) -> None:
    """Writes the parts that training does not change, tensor by tensor, and the tokenizers.

    Raises:
        UserError: a tensor has values that are not finite.
    """
    directory = epath.Path(directory)
    if directory.exists():  # of a start that did not come to its end, of another model perhaps
        directory.rmtree()
    directory.mkdir(parents=True)
    sums: dict[str, int] = {}

    def summed(name: str, tensor: Tensor) -> Tensor:
        return inspected(tensor, lambda array: sums.update({name: checksums.of_array(array)}))

    for part, named in tensors.items():
        named = {name: summed(f"{part}/{name}", tensor) for name, tensor in named.items()}
        try:
            files.write_part(directory, part, pipeline.parts[part].torch_config(), named)
        except NotFiniteError as error:
            raise UserError(f"model.pretrained: {error}; give another model, or another copy of it") from error
    write_whole(directory / _CHECKSUMS_FILE, json.dumps(sums, indent=0) + "\n")
    write_tokenizers(directory, pipeline.family, pipeline.tokenizers)
    if carried:
        write_tensors(directory / CARRIED_FILE, carried, metadata={"format": "pt"})
    digests.write(directory)


def write_tokenizers(directory: epath.PathLike, family: Family, tokenizers: Mapping[str, Any]) -> None:
    """Writes the tokenizer of each text encoder into the folder that its family has for it."""
    for part, tokenizer in tokenizers.items():
        family.tokenizing.save(tokenizer, epath.Path(directory) / family.tokenizing.folders[part])


def read_tokenizers(directory: epath.PathLike, family: Family) -> dict[str, Any]:
    """What `write_tokenizers` wrote."""
    folders = {part: epath.Path(directory) / name for part, name in family.tokenizing.folders.items()}
    return {part: family.tokenizing.load(folder) for part, folder in folders.items() if folder.exists()}


def frozen_tensors(directory: epath.PathLike, part: str, model: Any) -> dict[str, Tensor]:
    """A part that `write_frozen` wrote, by PyTorch's names, not read yet.

    A tensor that is read whole is compared with its checksum; a part of one, as where several hosts share it, is not.

    Raises:
        UserError: it is missing, damaged or not the model's; and when a tensor is read, that it has changed.
    """
    tensors = files.open_part(directory, part)
    flax_tensors(tensors, abstract_params(model), f"workdir: {directory}/{part}")
    file = epath.Path(directory) / _CHECKSUMS_FILE
    sums = parse_object(file.read_bytes()) if file.exists() else {}  # whole, or `digests.check` has refused it

    def checked(name: str, tensor: Tensor) -> Tensor:
        def check(array: np.ndarray) -> None:
            if array.shape == tensor.shape and name in sums:
                try:
                    checksums.check_array(array, sums[name], name)
                except ValueError as error:
                    raise UserError(f"workdir: {directory}: {error}; restore it from a copy") from error

        return inspected(tensor, check)

    return {name: checked(f"{part}/{name}", tensor) for name, tensor in tensors.items()}


def carried_of(directory: epath.PathLike) -> dict[str, Tensor]:
    """What `write_frozen` wrote of a single file's other tensors."""
    file = epath.Path(directory) / CARRIED_FILE
    return open_tensors([file], "workdir") if file.exists() else {}


def stored_dtype(pipeline: Pipeline, part: str) -> Any:
    """The type of a part's frozen weights on the devices: float32 of the autoencoder, else that it computes in."""
    return jnp.dtype(jnp.float32 if part == pipeline.family.autoencoder else pipeline.parts[part].dtype)


def load_frozen(
    directory: epath.PathLike,
    pipeline: Pipeline,
    parts: Sequence[str],
    shardings_of: Callable[[PyTree], PyTree],
) -> dict[str, PyTree]:
    """The frozen parts of a work directory in their shards.

    Args:
        shardings_of: abstract parameters → their shardings.
    """
    loaded = {}
    for part in parts:
        model = pipeline.parts[part]
        like, where = abstract_params(model), f"workdir: {directory}/{part}"
        tensors = flax_tensors(frozen_tensors(directory, part, model), like, where)
        dtype = stored_dtype(pipeline, part)
        loaded[part] = load(tensors, shardings_of(like), dtype)
    return loaded
