"""What every network of ours owes to the PyTorch class of its `torch_config`."""

from collections.abc import Callable
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from jaxtyping import Array, PyTree

from offsetjax.formats.names import flax_tensors, torch_tensors
from offsetjax.formats.tensors import of_array
from tests.torch_models import gradient_errors, relative_error


def normal(*shape: int) -> np.ndarray:
    """Standard normal numbers, always the same for a number of axes."""
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def assert_as_pytorch(apply: Callable[[PyTree], Array], params: PyTree, theirs: torch.nn.Module, expected: Any) -> None:
    """Predictions within 1e-4, and gradients of a loss that weighs every element differently within 1e-3."""
    wanted = normal(*expected.shape)
    theirs.zero_grad()
    torch.nn.functional.mse_loss(expected, torch.from_numpy(wanted)).backward()

    def loss(params: PyTree) -> tuple[Array, Array]:
        ours = apply(params)
        return jnp.mean(jnp.square(ours - wanted)), ours

    gradients, ours = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert relative_error(ours, expected) < 1e-4
    errors = gradient_errors(gradients, theirs)
    assert max(errors.values()) < 1e-3, max(errors, key=lambda name: errors[name])


def assert_files_come_back(network: Any, theirs: torch.nn.Module) -> None:
    """A file of PyTorch's tensors, read and written again, is the same to the bit, names and types as well."""
    kept = dict(theirs.named_parameters()).keys() | dict(theirs.named_buffers()).keys()
    expected = {name: tensor.numpy() for name, tensor in theirs.state_dict().items() if name in kept}
    like = jax.eval_shape(network.init, jax.random.key(0))
    tensors = torch_tensors(flax_tensors({name: of_array(x) for name, x in expected.items()}, like, "a test"))
    assert tensors.keys() == expected.keys()
    for name, array in expected.items():
        assert tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(tensors[name](), array)


def assert_names_and_shapes(network: Any, parameters: float) -> None:
    """Those of the PyTorch class at full size, without its weights; and about so many parameters."""
    config = network.torch_config()
    with torch.device("meta"):
        if "architectures" in config:
            config_class = transformers.CONFIG_MAPPING[config["model_type"]]
            theirs = getattr(transformers, config["architectures"][0])(config_class(**config))
        else:
            theirs = getattr(diffusers, config["_class_name"]).from_config(config)
    kept = dict(theirs.named_parameters()).keys() | dict(theirs.named_buffers()).keys()
    expected = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items() if name in kept}
    ours = torch_tensors(jax.eval_shape(network.init, jax.random.key(0)))
    assert {name: tensor.shape for name, tensor in ours.items()} == expected
    assert abs(sum(tensor.size for tensor in ours.values()) / parameters - 1) < 0.01
