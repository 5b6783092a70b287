"""LoRA: a small trained addition to the frozen weights of chosen layers (Hu et al. 2021, arXiv 2106.09685).

    y = W x + b + scale · up(down(x))            scale = α / rank,  the same as  (W + scale · up · down) x + b

`down` takes the layer's input to `rank` channels, as the layer itself would (a convolution keeps its size, stride and
padding), and `up` takes those to the layer's output. Adapters are a nested dict with the paths of the model's own
parameters, `{"down": [i, r] or [h, w, i, r], "up": [r, o] or [1, 1, r, o]}` where those have `kernel`. At first `up`
is 0, and the adapted model the model itself.
"""

import difflib
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Key, PyTree

from offsetjax.errors import UserError
from offsetjax.formats.lora_names import layers
from offsetjax.formats.tensors import Tensor

ARRAYS = ("down", "up")


@dataclass(frozen=True)
class Adapted:
    """A model of the boundary with adapters; all but `apply` is the model's own: `config`, `torch_config` and so on."""

    model: Any
    scale: float

    def __getattr__(self, name: str) -> Any:
        if name == "model" or name.startswith("_"):  # as a copy asks for before there is a model
            raise AttributeError(name)
        return getattr(self.model, name)

    def apply(self, params: Mapping[str, PyTree], *args: Any, **kwargs: Any) -> Any:
        """The model's `apply`.

        Args:
            params: `base`, the model's own parameters, and `adapters`.
        """
        # Beside the kernels that they adapt, so that whatever is done with a layer's weights is done with them.
        together = unflatten_dict(flatten_dict(params["base"]) | flatten_dict(params["adapters"]))
        with nn.intercept_methods(_interceptor(self.scale)):
            return self.model.apply(together, *args, **kwargs)


def _interceptor(scale: float) -> Callable:
    def interceptor(next_function: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        output, module = next_function(*args, **kwargs), context.module
        if context.method_name != "__call__" or not isinstance(module, nn.Dense | nn.Conv):
            return output
        if not module.has_variable("params", "down"):
            return output
        halves: Any = module.variables["params"]
        # Scaled in float32, before the cast: α / rank is seldom a number of bfloat16.
        down, up = halves["down"], jnp.asarray(scale * halves["up"], output.dtype)
        narrow = module.clone(features=down.shape[-1], use_bias=False, parent=None, name=None)
        hidden: Any = narrow.apply({"params": {"kernel": down}}, *args)
        return output + hidden @ up.reshape(up.shape[-2:])

    return interceptor


def init_adapters(
    key: Key[Array, ""], base_like: PyTree, targets: Sequence[str], rank: int, where: str = "lora.targets"
) -> PyTree:
    """Fresh float32 adapters, which change nothing: `down` as PyTorch draws a layer's weight, `up` 0.

    Each `down` is drawn from a stream of its own, by the layer's name: U(-1/√n, 1/√n) with n inputs an output.

    Args:
        base_like: the model's parameters, or abstract ones.
        targets: ends of the layers' PyTorch names, in whole components: `to_q`, `ff.net.0.proj`, `conv1`.
        where: the config's name of the targets, for errors.

    Raises:
        UserError: a target that no linear or convolutional layer's name ends in.
    """
    paths, kernels = layers(base_like), flatten_dict(base_like)
    chosen: dict[str, tuple[str, ...]] = {}
    for target in targets:
        found = {name: path for name, path in paths.items() if f".{name}".endswith(f".{target}")}
        if not found:
            raise UserError(f"config: {where}: no layer's name ends in {target!r}; {_near(target, paths)}")
        chosen |= found
    adapters = {}
    for name, path in chosen.items():
        *window, inputs, outputs = kernels[*path, "kernel"].shape
        bound = 1 / math.sqrt(math.prod([*window, inputs]))
        name_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        down = jax.random.uniform(name_key, (*window, inputs, rank), minval=-bound, maxval=bound)
        adapters[*path, "down"] = down
        adapters[*path, "up"] = jnp.zeros((*(1 for _ in window), rank, outputs))
    return unflatten_dict(adapters)


def _near(target: str, names: Iterable[str]) -> str:
    components = [name.split(".") for name in names]
    ends = {".".join(each[-count:]) for each in components for count in (1, 2, 3)}
    near = difflib.get_close_matches(target, sorted(end for end in ends if not end.isdigit()), 3)
    return f"did you mean {' or '.join(near)}?" if near else "give the ends of diffusers' names, such as to_q"


def merged_tensors(tensors: Mapping[str, Tensor], adapters: PyTree, scale: float) -> dict[str, Tensor]:
    """The tensors, by their PyTorch names, of layers that give what the adapted ones give; all are lazy.

    A merged tensor is float32, whatever its base: it is rounded once, where it is written.
    """
    result, halves = dict(tensors), flatten_dict(adapters)
    for name, path in layers(adapters, "down").items():
        down, up = (np.asarray(halves[*path, half], np.float32) for half in ("down", "up"))
        result[f"{name}.weight"] = _merged_tensor(tensors[f"{name}.weight"], down, scale * up)
    return result


def _merged_tensor(tensor: Tensor, down: Float[np.ndarray, "*n i r"], up: Float[np.ndarray, "*m r o"]) -> Tensor:
    # W [o, i, *n] gains the product of [o, r] and [r, i, *n].
    down, up = np.moveaxis(down, (-1, -2), (0, 1)), up.reshape(up.shape[-2:]).T

    def read(index: tuple[slice, ...]) -> Float[np.ndarray, "..."]:
        rows = up[index[0]] if index else up
        added = (rows @ down.reshape(len(down), -1)).reshape(-1, *tensor.shape[1:])
        return tensor.read(index).astype(np.float32) + added[(slice(None), *index[1:])]

    return Tensor(tensor.shape, np.dtype(np.float32), read)
