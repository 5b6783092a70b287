"""What a run does not change, on its own disk: `frozen/` of its work directory, written once and read from then on.

The frozen parts are in diffusers' form and in the type in which they came, with their tokenizers, so that nothing
outside the work directory is needed to resume, sample or export, and what was imported can be exported bit for bit.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
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
from offsetjax.models.weights import abstract_params, load
from offsetjax.storage import checksums, digests

CARRIED_FILE = "carried.safetensors"
_CHECKSUMS_FILE = "checksums.json"  # of the arrays of the frozen parts, by part and PyTorch's name


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
            config = pipeline.parts[part].torch_config()
            files.write_part(directory, part, config, named, has_checksums=False)  # they are in a file of their own
        except NotFiniteError as error:
            raise UserError(f"model.pretrained: {error}; give another model, or another copy of it") from error
    write_whole(directory / _CHECKSUMS_FILE, json.dumps(sums, indent=0) + "\n")
    write_tokenizers(directory, pipeline.family, pipeline.tokenizers)
    if carried:
        write_tensors(directory / CARRIED_FILE, carried, metadata={"format": "pt"}, has_checksums=False)
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
    """A part that `write_frozen` wrote, by PyTorch's names, as lazy tensors.

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
    shardings_of: Callable[[PyTree], PyTree],
) -> dict[str, PyTree]:
    """The frozen parts of a work directory in their shards.

    Args:
        shardings_of: abstract parameters → their shardings.
    """
    loaded = {}
    for part in pipeline.frozen:
        model = pipeline.parts[part]
        like, where = abstract_params(model), f"workdir: {directory}/{part}"
        tensors = flax_tensors(frozen_tensors(directory, part, model), like, where)
        dtype = stored_dtype(pipeline, part)
        loaded[part] = load(tensors, shardings_of(like), dtype)
    return loaded
