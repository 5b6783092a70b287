"""A loop over the blocks of a transformer changes no number and no name, and is compiled once."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import PyTree

from offsetjax.models.lora import Adapted, init_adapters
from offsetjax.models.pipeline import build
from offsetjax.models.text import TextEncoder
from offsetjax.models.tracing import Tracing
from offsetjax.models.unet import UNet
from tests.models.gradients import assert_alike, gradients_of, kept, loss_of
from tests.tiny import quick_compilation, tiny_config

DEPTH = 3
# Transformers in the middle alone, which compile quickly.
SMALL = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}


def traced_as(model: Any, **settings: Any) -> Any:
    return replace(model, tracing=Tracing(**settings))


@pytest.fixture(scope="module", autouse=True)
def _quickly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with quick_compilation(tmp_path_factory.getbasetemp()):
        yield


def _unet(depth: int = DEPTH) -> UNet:
    config = tiny_config()
    config.model.unet.update(SMALL)
    config.model.unet.transformer_layers_per_block = (depth,) * len(config.model.unet.block_out_channels)
    return build(config).denoiser


@pytest.fixture(scope="module")
def unet() -> UNet:
    return _unet()


@pytest.fixture(scope="module")
def params(unet: UNet) -> PyTree:
    return jax.jit(unet.init)(jax.random.key(0))


def test_loss_and_gradients_are_the_same(unet: UNet, params: PyTree) -> None:
    plain = gradients_of(unet, params)
    for remat in ("none", "blocks", "full"):
        assert_alike(gradients_of(traced_as(unet, remat=remat, is_scanned=True), params), plain)


def test_a_loop_that_is_computed_again_keeps_no_weights(unet: UNet, params: PyTree) -> None:
    """Beside the model's own, that is; each of them stacks the weights of its layers."""
    again, plain = (
        traced_as(unet, remat="blocks", is_scanned=True),
        traced_as(unet, remat="blocks"),
    )
    assert kept(again, params) <= 1.01 * kept(plain, params)


@pytest.mark.parametrize(
    ("targets", "loops"),
    [
        (("to_q", "ff.net.2"), True),
        (("transformer_blocks.1.attn1.to_q",), False),  # blocks that are not alike make no loop
    ],
)
def test_so_they_are_with_adapters(unet: UNet, params: PyTree, targets: tuple[str, ...], loops: bool) -> None:
    adapters = init_adapters(jax.random.key(3), params, targets, rank=2)
    adapters = jax.tree.map(lambda x: 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), adapters)
    both = {"base": params, "adapters": adapters}
    looped = Adapted(traced_as(unet, remat="blocks", is_scanned=True), 0.5)
    assert_alike(gradients_of(looped, both), gradients_of(Adapted(unet, 0.5), both))
    assert (_dots(looped, both) < _dots(Adapted(unet, 0.5), both)) == loops


@pytest.mark.parametrize("is_penultimate", [False, True])
def test_text_encoders_give_the_same(is_penultimate: bool) -> None:
    config = tiny_config().model.text_encoder.to_dict() | {"num_hidden_layers": 4}
    encoder = TextEncoder(config, jnp.dtype("float32"), is_penultimate=is_penultimate, has_projection=is_penultimate)
    params = jax.jit(encoder.init)(jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (3, config["max_position_embeddings"]), 0, config["vocab_size"])
    looped = jax.jit(traced_as(encoder, is_scanned=True).apply)
    for plain, of_loop in zip(jax.jit(encoder.apply)(params, ids), looped(params, ids), strict=True):
        if plain is not None:
            np.testing.assert_allclose(of_loop, plain, rtol=1e-5, atol=1e-6)
    assert looped.lower(params, ids).as_text().count("stablehlo.dot_general") < 3 * 8 + 4


def test_the_program_does_not_grow_with_the_number_of_blocks(unet: UNet, params: PyTree) -> None:
    deeper = _unet(3 * DEPTH)
    deep_params = jax.eval_shape(deeper.init, jax.random.key(0))
    assert _dots(traced_as(deeper, is_scanned=True), deep_params) == _dots(traced_as(unet, is_scanned=True), params)
    assert _dots(deeper, deep_params) > 2 * _dots(unet, params)


def _dots(model: UNet | Adapted, params: PyTree) -> int:
    return jax.jit(jax.grad(loss_of(model))).lower(params).as_text().count("stablehlo.dot_general")
