"""Transformers computed again and in loops give the same loss and gradients, and keep less for the backward pass."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, PyTree

from offsetjax.models.dit import DiT
from offsetjax.models.flux2 import Flux2Transformer
from offsetjax.models.qwen3 import Qwen3
from offsetjax.models.sd3 import SD3Transformer
from offsetjax.models.tracing import Tracing
from offsetjax.models.z_image import ZImageTransformer
from tests import tiny
from tests.models import test_dit, test_flux2, test_sd3, test_text_encoders, test_z_image
from tests.models.gradients import assert_alike
from tests.models.judge import normal

TIMES = np.array([0.3, 0.7], np.float32)
# The network, its inputs, and how many loops it has of layers that repeat.
NETWORKS: dict[str, tuple[Any, tuple[Any, ...], int]] = {
    "Z-Image": (
        ZImageTransformer(test_z_image.SMALL, jnp.float32),
        (*test_z_image.inputs(6, 4), np.array([40, 3, 32])),
        1,
    ),
    "FLUX.2": (Flux2Transformer(test_flux2.SMALL, jnp.float32), (normal(2, 12, 3, 5), TIMES, normal(2, 7, 20)), 2),
    "SD 3": (SD3Transformer(test_sd3.SMALL, jnp.float32), test_sd3.inputs(), 1),
    "DiT": (DiT(test_dit.SMALL, jnp.float32), (normal(2, 5, 6, 10), 1000 * TIMES, np.array([3, 7])), 1),
    "Qwen3": (Qwen3(test_text_encoders.QWEN3, jnp.float32, states=(2, 3)), test_text_encoders.captions()[:1], 1),
}


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with tiny.quick_compilation(pathlib.Path(tmp_path_factory.getbasetemp())):
        yield


def loss_of(network: Any, inputs: tuple[Any, ...]) -> Callable[[PyTree], Array]:
    return lambda params: jnp.square(network.apply(params, *inputs)).mean()


def kept(loss: Callable[[PyTree], Array], params: PyTree) -> int:
    """Bytes that wait for the backward pass."""
    backward = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
    return sum(each.size * each.dtype.itemsize for each in jax.tree.leaves(backward))


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_computed_again_and_in_loops_have_the_same_gradients(name: str) -> None:
    network, inputs, loops = NETWORKS[name]
    params = jax.tree.map(lambda leaf: leaf + 0.02, network.init(jax.random.key(0)))
    plain = loss_of(network, inputs)
    expected = jax.jit(jax.value_and_grad(plain))(params)
    for tracing in (Tracing(remat="blocks"), Tracing(remat="blocks", is_scanned=True)):
        loss = loss_of(dataclasses.replace(network, tracing=tracing), inputs)
        assert_alike(jax.jit(jax.value_and_grad(loss))(params), expected)
        assert kept(loss, params) < 0.9 * kept(plain, params)
        assert str(jax.make_jaxpr(loss)(params)).count("scan[") == loops * tracing.is_scanned


def test_attention_alone_is_computed_again() -> None:
    network, inputs, _ = NETWORKS["DiT"]
    params = jax.tree.map(lambda leaf: leaf + 0.02, network.init(jax.random.key(0)))
    again = loss_of(dataclasses.replace(network, tracing=Tracing(remat="attention")), inputs)
    blocks = loss_of(dataclasses.replace(network, tracing=Tracing(remat="blocks")), inputs)
    plain = loss_of(network, inputs)
    assert_alike(jax.jit(jax.value_and_grad(again))(params), jax.jit(jax.value_and_grad(plain))(params))
    assert kept(blocks, params) < kept(again, params) < kept(plain, params)
