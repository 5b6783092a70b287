"""Each correction of the Flax modules: as they come they miss PyTorch's numbers, corrected they meet them."""

import ast
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models import resnet_flax, vae_flax
from diffusers.models.activations import GEGLU
from diffusers.models.attention_flax import FlaxAttention, FlaxGEGLU, FlaxTransformer2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, PyTree

import offsetjax
from offsetjax.formats.names import from_torch, torch_name
from offsetjax.models import autoencoder, unet
from tests import torch_models


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def params_of(theirs: torch.nn.Module, module: nn.Module, *inputs: Array) -> PyTree:
    like = flatten_dict(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"])
    arrays = {name: parameter.detach().numpy() for name, parameter in theirs.named_parameters()}
    return unflatten_dict({path: from_torch(path, arrays[torch_name(path)]) for path in like})


def stock_and_corrected(
    module: nn.Module, params: PyTree, *inputs: Array, groups: int = 32, numerics: Callable = unet.numerics
) -> tuple[Any, Any]:
    stock = module.apply({"params": params}, *inputs)
    with numerics(groups):
        return stock, module.apply({"params": params}, *inputs)


def largest_error(ours: Array, theirs: np.ndarray) -> float:
    """Relative to the largest value."""
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def root_mean_square_error(ours: Any, theirs: torch.Tensor) -> float:
    """Relative to the root mean square value."""
    ours, theirs = np.asarray(ours, np.float32), theirs.numpy()
    return float(np.sqrt(np.square(ours - theirs).mean() / np.square(theirs).mean()))


def channels_last(x: torch.Tensor | np.ndarray) -> np.ndarray:
    return np.moveaxis(np.asarray(x), 1, -1)


def test_geglu_takes_the_exact_gelu() -> None:
    theirs, module, x = torch_models.randomise(GEGLU(16, 64)), FlaxGEGLU(16), normal(4, 64, 16)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x)).numpy()
    stock, corrected = stock_and_corrected(module, params_of(theirs, module, x), x)
    assert largest_error(corrected, expected) < 1e-6 < 1e-4 < largest_error(stock, expected)


def test_a_transformers_normalisation_has_an_epsilon_of_its_own() -> None:
    """Seen where there is little variance; and without a layer, so that nothing else is different."""
    theirs = Transformer2DModel(2, 16, 32, num_layers=0, cross_attention_dim=8, use_linear_projection=True)
    module = FlaxTransformer2DModel(32, 2, 16, depth=0, use_linear_projection=True)
    x, context = 1e-3 * normal(2, 32, 8, 8), normal(2, 4, 8)
    with torch.no_grad():
        expected = channels_last(torch_models.randomise(theirs)(torch.from_numpy(x), torch.from_numpy(context)).sample)
    inputs = channels_last(x), context
    stock, corrected = stock_and_corrected(module, params_of(theirs, module, *inputs), *inputs)
    assert largest_error(corrected, expected) < 1e-5 < 1e-1 < largest_error(stock, expected)


@pytest.mark.parametrize(
    ("groups", "mean", "deviation"), [(8, 0.0, 1.0), (32, 10.0, 1e-3)], ids=["8 groups", "a picture of one colour"]
)
def test_group_normalisation_has_the_groups_it_should_and_sees_little_differences(
    groups: int, mean: float, deviation: float
) -> None:
    theirs = torch_models.randomise(torch.nn.GroupNorm(groups, 64, 1e-6))
    module = nn.GroupNorm(32, epsilon=1e-6)
    x = mean + deviation * normal(2, 64, 8, 8)
    params = params_of(theirs, module, channels_last(x))
    with torch.no_grad():
        expected = channels_last(theirs.double()(torch.from_numpy(x).double()))
    stock, corrected = stock_and_corrected(module, params, channels_last(x), groups=groups)
    assert largest_error(corrected, expected) < 1e-6 < 1e-2 < largest_error(stock, expected)


def test_the_gradient_of_group_normalisation_is_pytorchs() -> None:
    theirs, module = torch_models.randomise(torch.nn.GroupNorm(8, 32, 1e-6)), nn.GroupNorm(32, epsilon=1e-6)
    x, weights = 3 + normal(2, 32, 6, 6), normal(2, 32, 6, 6)[::-1].copy()
    params = params_of(theirs, module, channels_last(x))
    (theirs(leaf := torch.from_numpy(x).requires_grad_()) * torch.from_numpy(weights)).sum().backward()

    def loss(params: PyTree, x: Array) -> Array:
        with unet.numerics(8):
            return jnp.sum(module.apply({"params": params}, x) * channels_last(weights))

    of_params, of_x = jax.grad(loss, (0, 1))(params, channels_last(x))
    assert largest_error(of_x, channels_last(leaf.grad)) < 1e-5
    assert largest_error(of_params["scale"], theirs.weight.grad.numpy()) < 1e-5
    assert largest_error(of_params["bias"], theirs.bias.grad.numpy()) < 1e-5


def test_group_normalisation_gives_the_type_that_it_is_given() -> None:
    module, x = nn.GroupNorm(32), jnp.asarray(normal(2, 8, 8, 32), jnp.bfloat16)
    stock, corrected = stock_and_corrected(module, module.init(jax.random.key(0), x)["params"], x)
    assert (stock.dtype, corrected.dtype) == (jnp.float32, jnp.bfloat16)


def test_bfloat16_attention_is_as_exact_as_pytorchs() -> None:
    """The softmax is taken in float32."""
    theirs, module, x = (
        Attention(32, heads=4, dim_head=8),
        FlaxAttention(32, 4, 8, dtype=jnp.bfloat16),
        3 * normal(1, 1024, 32),
    )
    params = params_of(torch_models.randomise(theirs), module, x)

    def run(dtype: torch.dtype) -> torch.Tensor:
        return theirs.to(dtype)(torch.from_numpy(x).to(dtype)).float()

    with torch.no_grad():
        exact = run(torch.float32)
        pytorchs = root_mean_square_error(run(torch.bfloat16), exact)
    outputs = stock_and_corrected(module, params, jnp.asarray(x, jnp.bfloat16))
    stock, corrected = (root_mean_square_error(output, exact) for output in outputs)
    assert corrected < 1.1 * pytorchs
    assert corrected < 0.95 * stock


@pytest.mark.parametrize(
    ("make", "numerics"),
    [(resnet_flax.FlaxUpsample2D, unet.numerics), (vae_flax.FlaxUpsample2D, autoencoder.numerics)],
)
def test_upsampling_gathers_and_scatters_nothing(make: Callable, numerics: Callable) -> None:
    module, x = make(8), jnp.asarray(normal(1, 4, 4, 8))
    params = module.init(jax.random.key(0), x)["params"]
    stock, corrected = stock_and_corrected(module, params, x, numerics=numerics)
    np.testing.assert_array_equal(stock, corrected)

    def graph() -> str:
        return str(jax.make_jaxpr(jax.grad(lambda x: module.apply({"params": params}, x).sum()))(x))

    assert "scatter" in graph()
    with numerics(32):
        assert "scatter" not in graph() and "gather" not in graph()


def test_an_autoencoder_without_attention_passes_its_input_on() -> None:
    module, x = vae_flax.FlaxAttentionBlock(32), jnp.asarray(normal(1, 4, 4, 32))
    with autoencoder.numerics(32, attends=False):
        output, variables = module.init_with_output(jax.random.key(0), x)
    np.testing.assert_array_equal(output, x)
    assert not variables


def test_diffusers_flax_classes_are_imported_by_the_two_files_that_wrap_them() -> None:
    importing = set()
    for path in pathlib.Path(offsetjax.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            is_from = isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "diffusers"
            if is_from or (isinstance(node, ast.Attribute) and node.attr.startswith("Flax")):
                importing.add(path.name)
    assert importing == {"unet.py", "autoencoder.py"}
