"""A DiT of ours is diffusers' where it has no settings of ours; with them it learns, and is told what it should be."""

import pathlib
import re
from collections.abc import Iterator
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from jaxtyping import Array, PyTree

from offsetjax.errors import UserError
from offsetjax.formats.dit_names import from_diffusers, to_diffusers
from offsetjax.formats.names import flax_tensors, torch_tensors
from offsetjax.formats.tensors import of_array
from offsetjax.models.dit import SIZES, DiT
from offsetjax.models.layers import place_embedding
from tests import tiny
from tests.models.judge import normal
from tests.torch_models import counterpart, relative_error

SMALL = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 5,
    "num_layers": 2,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "num_embeds_ada_norm": 7,
}
SETTINGS = {"qk_norm": True, "rotary_theta": 100.0, "is_gated": True}
TIMES, CLASSES = np.array([20.0, 700.0], np.float32), np.array([3, 7], np.int32)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with tiny.quick_compilation(pathlib.Path(tmp_path_factory.getbasetemp())):
        yield


def pytorchs(network: DiT) -> torch.nn.Module:
    """Theirs, with the same copies in each block."""
    theirs = counterpart(network)
    first, *others = theirs.transformer_blocks
    for block in others:
        block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    return theirs


def tensors_of(theirs: torch.nn.Module) -> dict[str, Any]:
    return {name: of_array(tensor.numpy()) for name, tensor in theirs.state_dict().items()}


def params_of(theirs: torch.nn.Module, network: DiT) -> PyTree:
    like = jax.eval_shape(network.init, jax.random.key(0))
    tensors = flax_tensors(from_diffusers(tensors_of(theirs), "a test"), like, "a test")
    return jax.tree.map(lambda tensor: jnp.asarray(tensor()), tensors)


def test_the_prediction_and_its_gradients_are_pytorchs() -> None:
    network = DiT(SMALL, jnp.float32)
    theirs = pytorchs(network)
    latents = normal(2, 5, 8, 8)
    prediction = theirs(torch.from_numpy(latents), torch.from_numpy(TIMES), torch.from_numpy(CLASSES)).sample
    wanted = latents[::-1].copy()
    torch.nn.functional.mse_loss(prediction, torch.from_numpy(wanted)).backward()

    def loss(params: PyTree) -> tuple[Array, Array]:
        ours = network.apply(params, latents, TIMES, CLASSES)
        return jnp.mean(jnp.square(ours - wanted)), ours

    gradients, ours = jax.jit(jax.grad(loss, has_aux=True))(params_of(theirs, network))
    assert relative_error(ours, prediction) < 1e-4
    # A weight of which there are copies has the sum of their gradients.
    expected: dict[str, np.ndarray] = {}
    for name, parameter in theirs.named_parameters():
        own = re.sub(r"transformer_blocks\.\d+\.norm1\.emb", "emb", name)
        expected[own] = expected.get(own, 0) + parameter.grad.numpy()
    largest = max(np.abs(gradient).max() for gradient in expected.values())
    for name, tensor in torch_tensors(gradients).items():
        scale = max(np.abs(expected[name]).max(), 1e-4 * largest)
        assert np.abs(tensor() - expected[name]).max() < 1e-3 * scale, name


def test_a_picture_that_is_not_square_has_pytorchs_places() -> None:
    """Its class cannot draw one, but tells its patches their places."""
    network = DiT(SMALL, jnp.float32)
    theirs = pytorchs(network)
    latents = normal(2, 5, 6, 10)
    expected = theirs.pos_embed(torch.from_numpy(latents)) - theirs.pos_embed.proj(torch.from_numpy(latents)).flatten(
        2
    ).transpose(1, 2)
    ours = place_embedding(24, np.arange(3) * 4 / 3, np.arange(5) * 4 / 5)
    assert np.abs(ours - expected[0].detach().numpy()).max() < 1e-5


def test_files_go_to_diffusers_and_come_back_bit_for_bit() -> None:
    network = DiT(SMALL, jnp.float32)
    theirs = pytorchs(network)
    tensors = to_diffusers(torch_tensors(params_of(theirs, network)))
    expected = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    assert tensors.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(tensors[name](), array)


def test_copies_that_differ_are_refused() -> None:
    network = DiT(SMALL, jnp.float32)
    with pytest.raises(UserError, match=r"a test: transformer_blocks\.1\.norm1\.emb\..* is not the same in all blocks"):
        from_diffusers(tensors_of(counterpart(network)), "a test")


@pytest.mark.parametrize("settings", [{}, *({name: value} for name, value in SETTINGS.items()), SETTINGS])
def test_each_setting_is_trained_from_nothing(settings: dict[str, Any]) -> None:
    network = DiT({**SMALL, **settings}, jnp.float32)
    params = network.init(jax.random.key(0))
    latents = normal(2, 5, 6, 10)
    np.testing.assert_array_equal(network.apply(params, latents, TIMES, CLASSES), 0)
    changed = jax.tree.map(lambda leaf: leaf + 0.05, params)  # away from the point where gates are shut
    ours, gradients = jax.jit(
        jax.value_and_grad(lambda params: jnp.square(network.apply(params, latents, TIMES, CLASSES)).mean())
    )(changed)
    assert ours > 0
    assert all(np.any(gradient) for gradient in jax.tree.leaves(gradients))
    names = {"/".join(path) for path in flatten_dict(params)}
    assert any("norm_q" in name for name in names) == bool(settings.get("qk_norm"))
    assert any("gate_proj" in name for name in names) == bool(settings.get("is_gated"))
    assert network.is_plain == (not settings)


def test_parameters_are_drawn_as_the_paper_says() -> None:
    params = DiT({**SMALL, "attention_head_dim": 48}, jnp.float32).init(jax.random.key(0))
    block = params["transformer_blocks_1"]
    assert not np.any(block["norm1"]["linear"]["kernel"]) and not np.any(params["proj_out_2"]["kernel"])
    kernel = np.asarray(block["attn1"]["to_q"]["kernel"])
    assert kernel.std() == pytest.approx((2 / (96 + 96)) ** 0.5, rel=0.03)
    assert np.abs(kernel).max() < (6 / (96 + 96)) ** 0.5
    assert np.asarray(params["pos_embed"]["proj"]["kernel"]).std() == pytest.approx((2 / (20 + 96)) ** 0.5, rel=0.05)
    assert np.asarray(params["emb"]["timestep_embedder"]["linear_1"]["kernel"]).std() == pytest.approx(0.02, rel=0.03)
    other = params["transformer_blocks_0"]["attn1"]["to_q"]["kernel"]
    assert np.abs(kernel - other).max() > 0.1


@pytest.mark.parametrize(
    ("name", "parameters"), [("S", 33e6), ("B", 131e6), ("L", 458e6), ("XL", 675e6), ("3B", 3.0e9)]
)
def test_the_papers_sizes_have_its_numbers_of_parameters(name: str, parameters: float) -> None:
    layers, heads, channels = SIZES[name]
    sizes = {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": channels}
    network = DiT({**SMALL, "sample_size": 32, "in_channels": 4, "num_embeds_ada_norm": 1000, **sizes}, jnp.bfloat16)
    ours = to_diffusers(torch_tensors(jax.eval_shape(network.init, jax.random.key(0))))
    with torch.device("meta"):
        theirs = diffusers.DiTTransformer2DModel.from_config(network.torch_config())
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()
    }
    count = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(network.init, jax.random.key(0))))
    assert count == pytest.approx(parameters, rel=0.02)


def test_what_diffusers_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="no model that diffusers has"):
        DiT({**SMALL, "qk_norm": True}, jnp.float32).torch_config()
    network = DiT(SMALL, jnp.float32)
    with pytest.raises(ValueError, match="latents of 8 x 5 do not divide into patches of 2"):
        jax.eval_shape(
            network.apply, jax.eval_shape(network.init, jax.random.key(0)), normal(2, 5, 8, 5), TIMES, CLASSES
        )
