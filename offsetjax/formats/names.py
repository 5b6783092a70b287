"""Flax parameter paths and PyTorch tensor names, and the transposition between their layouts.

down_blocks_0/resnets_1/conv1/kernel [h, w, i, o]  ↔  down_blocks.0.resnets.1.conv1.weight [o, i, h, w]
.../to_q/kernel [i, o]                             ↔  .../to_q.weight [o, i]
.../norm1/scale                                    ↔  ...norm1.weight
"""

import re

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from offsetjax.errors import UserError

# The autoencoder's attention has its old names in Flax, and in PyTorch checkpoints written before 2023.
_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_IGNORED = re.compile(r"\.position_ids$")  # a buffer of old text encoders, not a parameter


def torch_name(path: tuple[str, ...]) -> str:
    """The PyTorch name of a Flax parameter path."""
    *modules, leaf = path
    leaf = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(leaf, leaf)
    if len(modules) > 1 and "attentions_" in modules[-2]:
        modules[-1] = _VAE_ATTENTION.get(modules[-1], modules[-1])
    # A trailing number is an index into a list, except in time_embedding.linear_1 and its like.
    names = [m if m.startswith("linear_") else re.sub(r"_(\d+)$", r".\1", m) for m in modules]
    return ".".join([*names, leaf])


def to_torch(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    """A Flax parameter in PyTorch's layout."""
    if path[-1] != "kernel":
        return array
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def from_torch(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch`."""
    if path[-1] != "kernel":
        return array
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def params_to_tensors(params: PyTree) -> dict[str, np.ndarray]:
    """Every parameter by its PyTorch name, in its PyTorch layout."""
    return {
        torch_name(path): np.ascontiguousarray(to_torch(path, np.asarray(jax.device_get(array))))
        for path, array in flatten_dict(params).items()
    }


def tensors_to_params(tensors: dict[str, np.ndarray], like: PyTree, where: str) -> PyTree:
    """The parameters in float32, in the structure and shapes of `like` (arrays or abstract arrays).

    Raises:
        UserError: missing, extra or misshapen tensors, by name.
    """
    expected = {torch_name(path): (path, leaf.shape) for path, leaf in flatten_dict(like).items()}
    tensors = {_modern(name, expected): tensor for name, tensor in tensors.items() if not _IGNORED.search(name)}
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is not part of the model" for name in tensors if name not in expected]
    params = {}
    for name, (path, shape) in expected.items():
        if name not in tensors:
            continue
        tensor = tensors[name]
        if tensor.ndim == 4 and len(shape) == 2:  # old 1x1 convolutions that are now linear
            tensor = tensor[:, :, 0, 0] if tensor.shape[2:] == (1, 1) else tensor
        tensor = from_torch(path, tensor)
        if tensor.shape != shape:
            torch_shape = to_torch(path, np.empty(shape, np.bool_)).shape
            problems.append(f"{name} has shape {tensors[name].shape}, not {torch_shape}")
        params[path] = np.asarray(tensor, np.float32)
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(f"{where}: {'; '.join(problems[:4])}{more}; is it the checkpoint of another model?")
    return unflatten_dict(params)


def _modern(name: str, expected: dict) -> str:
    if name in expected:
        return name
    *modules, leaf = name.split(".")
    new = ".".join([*modules[:-1], *(_VAE_ATTENTION.get(module, module) for module in modules[-1:]), leaf])
    return new if new in expected else name
