"""Flax parameter paths and PyTorch tensor names, and the transposition between their layouts.

down_blocks_0/resnets_1/conv1/kernel [h, w, i, o]  ↔  down_blocks.0.resnets.1.conv1.weight [o, i, h, w]
.../to_q/kernel [i, o]                             ↔  .../to_q.weight [o, i]
.../norm1/scale                                    ↔  ...norm1.weight
"""

import re
from collections.abc import Mapping

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from offsetjax.errors import UserError
from offsetjax.formats.tensors import Tensor, cast, of_array, transposed, with_ndim

# The autoencoder's attention has its old names in Flax, and in PyTorch checkpoints written before 2023.
_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
TEXT_MODULE = "text_model"  # around a text encoder's layers; transformers from 5.6 on has none
_IGNORED = re.compile(r"\.position_ids$")  # a buffer of old text encoders, not a parameter
_NO_INDEX = ("linear_", "wi_", "proj_out_")  # before numbers that are no index: linear_1, T5's wi_0, DiT's proj_out_1
_COUNT = "num_batches_tracked"  # a batch norm's, an int64 in PyTorch; ours are all float32

# Of a kernel, by its number of axes: the order in which PyTorch's layout takes those of Flax, and the inverse.
_TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}
_FROM_TORCH = {2: (1, 0), 4: (2, 3, 1, 0)}


def torch_name(path: tuple[str, ...]) -> str:
    """The PyTorch name of a Flax parameter path."""
    *modules, leaf = path
    leaf = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(leaf, leaf)
    if len(modules) > 1 and "attentions_" in modules[-2]:
        modules[-1] = _VAE_ATTENTION.get(modules[-1], modules[-1])
    names = [m if m.startswith(_NO_INDEX) else re.sub(r"_(\d+)$", r".\1", m) for m in modules]
    return ".".join([*names, leaf])


def to_torch(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    """A Flax parameter in PyTorch's layout."""
    return array.transpose(_TO_TORCH[array.ndim]) if path[-1] == "kernel" else array


def from_torch(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch`."""
    return array.transpose(_FROM_TORCH[array.ndim]) if path[-1] == "kernel" else array


def torch_tensors(params: PyTree) -> dict[str, Tensor]:
    """Every parameter by its PyTorch name, in its PyTorch layout.

    Args:
        params: a tree of tensors, or of arrays.
    """
    tensors = {}
    for path, leaf in flatten_dict(params).items():
        tensor = leaf if isinstance(leaf, Tensor) else of_array(leaf)
        if path[-1] == "kernel":
            tensor = transposed(tensor, _TO_TORCH[len(tensor.shape)])
        tensors[torch_name(path)] = cast(tensor, np.int64) if path[-1] == _COUNT else tensor
    return tensors


def flax_tensors(tensors: Mapping[str, Tensor], like: PyTree, where: str) -> PyTree:
    """The parameters, as lazy tensors, in the structure and the shapes of `like`.

    Args:
        tensors: by PyTorch name.
        like: arrays, or abstract arrays.
        where: what an error begins with.

    Raises:
        UserError: missing, extra or misshapen tensors, by name.
    """
    expected = {torch_name(path): (path, tuple(leaf.shape)) for path, leaf in flatten_dict(like).items()}
    tensors = {_modern(name, expected): tensor for name, tensor in tensors.items() if not _IGNORED.search(name)}
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is not part of the model" for name in tensors if name not in expected]
    params = {}
    for name, (path, shape) in expected.items():
        if name not in tensors:
            continue
        tensor, wanted = tensors[name], _torch_shape(path, shape)
        is_old_convolution = len(wanted) == 2 and tensor.shape[2:] == (1,) * (len(tensor.shape) - 2)
        if is_old_convolution:  # that is linear now
            tensor = with_ndim(tensor, 2)
        if tensor.shape != wanted:
            problems.append(f"{name} has shape {tensor.shape}, not {wanted}")
            continue
        if path[-1] == _COUNT:
            tensor = cast(tensor, np.float32)
        if "float" not in tensor.dtype.name:
            problems.append(f"{name} holds {tensor.dtype.name}, not numbers with a floating point")
            continue
        params[path] = transposed(tensor, _FROM_TORCH[len(shape)]) if path[-1] == "kernel" else tensor
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(f"{where}: {'; '.join(problems[:4])}{more}; is it the checkpoint of another model?")
    return unflatten_dict(params)


def _torch_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in _TO_TORCH[len(shape)]) if path[-1] == "kernel" else shape


def _modern(name: str, expected: Mapping) -> str:
    if name in expected:
        return name
    if (inside := f"{TEXT_MODULE}.{name}") in expected:
        return inside
    *modules, leaf = name.split(".")
    new = ".".join([*modules[:-1], *(_VAE_ATTENTION.get(module, module) for module in modules[-1:]), leaf])
    return new if new in expected else name
