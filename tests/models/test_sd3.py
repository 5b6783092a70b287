"""Stable Diffusion 3's denoiser gives PyTorch's prediction and gradients, for pictures of any shape."""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from offsetjax.models.sd3 import SD3Transformer
from tests import tiny
from tests.models.judge import assert_as_pytorch, assert_files_come_back, assert_names_and_shapes, normal
from tests.torch_models import counterpart, params_of, relative_error

SMALL = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 5,
    "num_layers": 3,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "joint_attention_dim": 20,
    "caption_projection_dim": 24,
    "pooled_projection_dim": 14,
    "out_channels": 5,
    "pos_embed_max_size": 7,
    "dual_attention_layers": (0, 1),
    "qk_norm": "rms_norm",
}
# Of https://huggingface.co/stabilityai/stable-diffusion-3.5-medium, transformer/config.json.
MEDIUM = {
    **SMALL,
    "sample_size": 128,
    "in_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
}
TIMES = np.array([20.0, 700.0], np.float32)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with tiny.quick_compilation(pathlib.Path(tmp_path_factory.getbasetemp())):
        yield


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    return normal(2, 5, 6, 10), TIMES, normal(2, 7, 20), normal(2, 14)


def pytorchs(theirs: torch.nn.Module) -> torch.Tensor:
    latents, times, text, pooled = map(torch.from_numpy, inputs())
    return theirs(latents, text, pooled, times, return_dict=False)[0]


@pytest.mark.parametrize("changes", [{}, {"dual_attention_layers": (), "qk_norm": None}], ids=["3.5 medium", "3"])
def test_the_prediction_and_its_gradients_are_pytorchs(changes: dict[str, Any]) -> None:
    network = SD3Transformer({**SMALL, **changes}, jnp.float32)
    theirs = counterpart(network)
    params = params_of(theirs, network)
    fixed = params["pos_embed"].pop("pos_embed")

    def apply(params: Any) -> jax.Array:
        whole = {**params, "pos_embed": {**params["pos_embed"], "pos_embed": fixed}}
        return network.apply(whole, *inputs())

    assert_as_pytorch(apply, params, theirs, pytorchs(theirs))


def test_the_table_of_positions_is_pytorchs_and_does_not_move() -> None:
    network = SD3Transformer(SMALL, jnp.float32)
    theirs = counterpart(network)
    fresh = network.init(jax.random.key(0))["pos_embed"]["pos_embed"]
    np.testing.assert_allclose(fresh, theirs.pos_embed.pos_embed.numpy(), atol=1e-6)
    gradients = jax.grad(lambda params: network.apply(params, *inputs()).sum())(params_of(theirs, network))
    assert not np.any(gradients["pos_embed"]["pos_embed"])


def test_files_come_back_bit_for_bit() -> None:
    network = SD3Transformer(SMALL, jnp.float32)
    assert_files_come_back(network, counterpart(network))


def test_the_published_model_has_pytorchs_names_and_shapes() -> None:
    assert_names_and_shapes(SD3Transformer(MEDIUM, jnp.bfloat16), 2.47e9)


def test_bfloat16_drifts_by_little() -> None:
    """Of the largest value, in a small model with random weights: 1.6 %."""
    network = SD3Transformer(SMALL, jnp.float32)
    theirs = counterpart(network)
    half = dataclasses.replace(network, dtype=jnp.bfloat16)
    ours = jax.jit(half.apply)(params_of(theirs, network), *inputs())
    assert ours.dtype == jnp.float32
    assert 1e-4 < relative_error(ours, pytorchs(theirs)) < 0.03


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": "layer_norm"}, "qk_norm = 'layer_norm' is not known"),
        ({"caption_projection_dim": 20}, "width of a"),
    ],
)
def test_a_config_of_another_form_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SD3Transformer({**SMALL, **changes}, jnp.float32)


@pytest.mark.parametrize(
    ("sides", "message"),
    [((6, 16), "3 x 8 patches are more than the 7 x 7 that have"), ((6, 5), "latents of 6 x 5 do not divide into")],
)
def test_a_picture_that_does_not_fit_is_refused(sides: tuple[int, int], message: str) -> None:
    network = SD3Transformer(SMALL, jnp.float32)
    _, *others = inputs()
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(network.apply, jax.eval_shape(network.init, jax.random.key(0)), normal(2, 5, *sides), *others)
