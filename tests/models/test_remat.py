"""What is computed again changes no number and no name, and is not kept."""

import dataclasses
from collections.abc import Iterator

import jax
import pytest
from jaxtyping import PyTree

from offsetjax.models.pipeline import build
from offsetjax.models.tracing import Tracing
from offsetjax.models.unet import UNet
from tests.models.gradients import Gradients, assert_alike, gradients_of, kept
from tests.tiny import quick_compilation, tiny_config


@pytest.fixture(scope="module", autouse=True)
def _quickly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with quick_compilation(tmp_path_factory.getbasetemp()):
        yield


@pytest.fixture(scope="module")
def unet() -> UNet:
    return build(tiny_config()).denoiser


@pytest.fixture(scope="module")
def params(unet: UNet) -> PyTree:
    return jax.jit(unet.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def stock(unet: UNet, params: PyTree) -> Gradients:
    return gradients_of(unet, params)


@pytest.mark.parametrize("policy", ["attention", "blocks", "full"])
def test_loss_and_gradients_are_the_same(unet: UNet, params: PyTree, stock: Gradients, policy: str) -> None:
    assert_alike(gradients_of(dataclasses.replace(unet, tracing=Tracing(remat=policy)), params), stock)


def test_each_policy_keeps_less(unet: UNet, params: PyTree) -> None:
    none, attention, blocks, full = (
        kept(dataclasses.replace(unet, tracing=Tracing(remat=policy)), params)
        for policy in ("none", "attention", "blocks", "full")
    )
    assert attention < 0.9 * none
    assert blocks < 0.2 * none
    assert full < 0.6 * blocks
