"""What is computed again changes no number and no name, and is not kept."""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import PyTree

from offsetjax.models.pipeline import build
from offsetjax.models.remat import POLICIES
from offsetjax.models.unet import UNet
from tests.tiny import quick_compilation, tiny_config


def _loss(unet: UNet) -> Callable[[PyTree], jax.Array]:
    latents = jax.random.normal(jax.random.key(1), (2, 4, 16, 16))
    hidden = jax.random.normal(jax.random.key(2), (2, 8, unet.config["cross_attention_dim"]))
    return lambda params: jnp.square(unet.apply(params, latents, jnp.array([3, 700]), hidden)).mean()


@pytest.fixture(scope="module", autouse=True)
def _quickly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with quick_compilation(tmp_path_factory.getbasetemp()):
        yield


@pytest.fixture(scope="module")
def unet() -> UNet:
    return build(tiny_config()).unet


@pytest.fixture(scope="module")
def params(unet: UNet) -> PyTree:
    return jax.jit(unet.init)(jax.random.key(0))


def _gradients(unet: UNet, params: PyTree) -> tuple[jax.Array, PyTree]:
    return jax.jit(jax.value_and_grad(_loss(unet)))(params)


@pytest.fixture(scope="module")
def stock(unet: UNet, params: PyTree) -> tuple[jax.Array, PyTree]:
    return _gradients(unet, params)


def _kept(unet: UNet, params: PyTree) -> int:
    """Bytes that wait for the backward pass, beside the parameters."""
    backward = jax.eval_shape(lambda params: jax.vjp(_loss(unet), params)[1], params)
    return sum(each.size * each.dtype.itemsize for each in jax.tree.leaves(backward)) - sum(
        each.nbytes for each in jax.tree.leaves(params)
    )


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"none"}))
def test_loss_and_gradients_are_the_same(
    unet: UNet, params: PyTree, stock: tuple[jax.Array, PyTree], policy: str
) -> None:
    loss, gradients = _gradients(dataclasses.replace(unet, remat=policy), params)
    plain_loss, plain = stock
    assert float(loss) == pytest.approx(float(plain_loss), rel=1e-6)
    assert jax.tree.structure(gradients) == jax.tree.structure(plain)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(plain))
    apart = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), gradients, plain)
    assert max(jax.tree.leaves(apart)) < 1e-5 * largest


def test_each_policy_keeps_less(unet: UNet, params: PyTree) -> None:
    none, attention, blocks, full = (
        _kept(dataclasses.replace(unet, remat=policy), params) for policy in ("none", "attention", "blocks", "full")
    )
    assert attention < 0.9 * none
    assert blocks < 0.2 * none
    assert full < 0.6 * blocks
