"""Weights before the first step, straight into their shards: a pretrained model's tensors, a LoRA's or random numbers.

The second step of loading a model, once its config is complete (`resolve.py`); `frozen.py` keeps what a run does not
change.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding
from jaxtyping import PyTree
from ml_collections import ConfigDict

from offsetjax.errors import UserError
from offsetjax.formats.lora import LoadedLora, read_lora
from offsetjax.formats.names import flax_tensors, torch_tensors
from offsetjax.formats.pretrained import Pretrained
from offsetjax.formats.tensors import Tensor, inspected
from offsetjax.models.family import family_of, open_checkpoint
from offsetjax.models.lora import init_adapters
from offsetjax.models.pipeline import Pipeline, is_from_scratch
from offsetjax.parallel.sharding import path_name
from offsetjax.rng import stream_key


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


def part_tensors(pretrained: Pretrained, part: str, model: Any) -> PyTree:
    """A part's tensors in Flax's layout, checked against the model, lazy.

    Raises:
        UserError: missing, extra or misshapen tensors, by name.
    """
    where = f"model.pretrained: {pretrained.path}: {part}"
    return flax_tensors(pretrained.tensors(part), abstract_params(model), where)


def initial_params(model: ConfigDict, seed: int, part: str, network: Any, shardings: PyTree | None = None) -> PyTree:
    """A part's float32 parameters before training: loaded, or drawn at random from the stream `init/part`.

    Args:
        model: the section of a config.
        shardings: where they lie; None: on the host.

    Raises:
        UserError: a loaded one has values that are not finite.
    """
    if is_from_scratch(model, part):
        return jax.jit(network.init, out_shardings=shardings)(stream_key(seed, f"init/{part}"))
    tensors = part_tensors(open_checkpoint(model.pretrained, model.variant), part, network)
    where = f"model.pretrained: {model.pretrained}: {part}"
    tensors = jax.tree_util.tree_map_with_path(lambda path, tensor: _finite(tensor, where + path_name(path)), tensors)
    return on_host(tensors) if shardings is None else load(tensors, shardings, np.float32)


def _finite(tensor: Tensor, name: str) -> Tensor:
    def check(array: np.ndarray) -> None:
        if not np.isfinite(array).all():
            raise UserError(f"{name} has values that are not finite; give another model, or another copy of it")

    return inspected(tensor, check)


def initial_tensors(model: ConfigDict, seed: int, part: str, network: Any) -> dict[str, Tensor]:
    """A part before training by PyTorch's names: loaded, in the type in which it is stored, or drawn at random."""
    if is_from_scratch(model, part):
        return torch_tensors(jax.device_get(initial_params(model, seed, part, network)))
    return torch_tensors(part_tensors(open_checkpoint(model.pretrained, model.variant), part, network))


def carried_tensors(model: ConfigDict) -> dict[str, Tensor]:
    """What a single file has beyond the parts, kept so that an export can give it back."""
    return open_checkpoint(model.pretrained, model.variant).carried() if model.pretrained else {}


def left_out_tensors(model: ConfigDict) -> tuple[str, ...]:
    """The names of what a single file holds of its own training, which is no part of a model."""
    return tuple(open_checkpoint(model.pretrained, model.variant).ignored()) if model.pretrained else ()


def pretrained_tokenizers(model: ConfigDict) -> dict[str, Any] | None:
    """The tokenizers that come with the weights, by text encoder; None where captions have to teach one.

    A single file has none, and gets those that all models of its family have; so does a text encoder that is drawn at
    random, if it knows as many tokens.

    Raises:
        UserError: the checkpoint brings none, and its family has none of its own, or they do not fit the encoders.
    """
    family, folder = family_of(model), epath.Path(model.pretrained)
    tokenizing, is_learned = family.tokenizing, is_from_scratch(model, "tokenizer")
    if not is_learned and folder.is_dir():
        found = {}
        for part, name in tokenizing.folders.items():
            tokenizer = tokenizing.load(folder / name)
            try:
                found[part] = tokenizing.fit(tokenizer, model[part])
            except ValueError as error:
                raise UserError(
                    f"model.pretrained: {folder}: {part} has {error}; give the tokenizer that it was trained with"
                ) from error
        return found
    published = tokenizing.published(model)
    if published is None and not is_learned:
        raise UserError(
            f"model.pretrained: {folder} brings no tokenizer, and its text encoders know other tokens than those of "
            f"{family.title}; give a diffusers directory"
        )
    return published


def new_tokenizers(model: ConfigDict, captions: Sequence[str]) -> dict[str, Any]:
    """Tokenizers by text encoder, which have learnt their words from captions."""
    return family_of(model).tokenizing.new(model, captions)


def abstract_trained(pipeline: Pipeline, lora: ConfigDict) -> dict[str, PyTree]:
    """The shapes of what a run trains, by part: whole parts, or the adapters of the section `lora` of its config."""
    if not lora.rank:
        return {part: abstract_params(pipeline.parts[part]) for part in pipeline.trained}
    return jax.eval_shape(lambda: {part: _new_adapters(pipeline, lora, 0, part) for part in pipeline.trained})


def initial_trained(
    pipeline: Pipeline, model: ConfigDict, lora: ConfigDict, seed: int, shardings: dict[str, PyTree]
) -> dict[str, PyTree]:
    """What a run trains before its first step, by part, in float32.

    Args:
        model, lora: the sections of its config.

    Raises:
        UserError: the model or the LoRA to start from cannot be read, or is another architecture's.
    """
    if lora.rank:
        new = {part: _new_adapters(pipeline, lora, seed, part) for part in pipeline.trained}
        loaded = read_lora_of(model, lora.pretrained).adapters if lora.pretrained else {}
        return jax.device_put({**new, **loaded}, shardings)
    return {part: initial_params(model, seed, part, pipeline.parts[part], shardings[part]) for part in pipeline.trained}


def check_initial(pipeline: Pipeline, model: ConfigDict, lora: ConfigDict) -> None:
    """Raises the UserErrors of `initial_trained`, from the headers of the files, before anything is written."""
    abstract_trained(pipeline, lora)
    for part in () if lora.rank else pipeline.trained:
        if not is_from_scratch(model, part):
            part_tensors(open_checkpoint(model.pretrained, model.variant), part, pipeline.parts[part])


def _new_adapters(pipeline: Pipeline, lora: ConfigDict, seed: int, part: str) -> PyTree:
    key = stream_key(seed, f"init/{part}/adapters")
    field = "targets" if part == pipeline.family.denoiser else "text_encoder_targets"
    return init_adapters(key, abstract_params(pipeline.parts[part]), lora[field], lora.rank, f"lora.{field}")


def read_lora_of(model: ConfigDict, path: epath.PathLike) -> LoadedLora:
    """The adapters of a LoRA's file, checked against the networks that they are for."""
    family = family_of(model)
    networks = family.build(model, jnp.dtype(model.dtype))
    bases = {part: abstract_params(networks[part]) for part in networks if part != family.autoencoder}
    return read_lora(path, bases, family.name, family.files.kohya)


def load(tensors: PyTree, shardings: PyTree, dtype: Any) -> PyTree:
    """Lazy tensors, each straight into its shards: a process reads what its devices hold.

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
    """Lazy tensors as float32 arrays on the host."""
    return jax.tree.map(lambda tensor: np.asarray(tensor(), np.float32), tensors)
