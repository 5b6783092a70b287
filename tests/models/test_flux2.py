"""FLUX.2's denoiser gives PyTorch's prediction and gradients, for pictures of any shape."""

import dataclasses
import pathlib
from collections.abc import Iterator

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from offsetjax.models.flux2 import Flux2Transformer
from tests import tiny
from tests.models.judge import assert_as_pytorch, assert_files_come_back, assert_names_and_shapes, normal
from tests.torch_models import counterpart, params_of, relative_error

SMALL = {
    "patch_size": 1,
    "in_channels": 12,
    "out_channels": None,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 20,
    "timestep_guidance_channels": 24,
    "mlp_ratio": 3.0,
    "axes_dims_rope": (2, 4, 6, 4),
    "rope_theta": 2000,
    "eps": 1e-6,
    "guidance_embeds": False,
}
# Of https://huggingface.co/black-forest-labs/FLUX.2-klein-base-4B, transformer/config.json.
KLEIN = {
    **SMALL,
    "in_channels": 128,
    "num_layers": 5,
    "num_single_layers": 20,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "timestep_guidance_channels": 256,
    "axes_dims_rope": (32, 32, 32, 32),
}
TIMES = np.array([0.02, 0.7], np.float32)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with tiny.quick_compilation(pathlib.Path(tmp_path_factory.getbasetemp())):
        yield


def pytorchs(
    theirs: torch.nn.Module, latents: np.ndarray, text: np.ndarray, guidance: np.ndarray | None
) -> torch.Tensor:
    """As its pipeline calls it, with the pipeline's own positions."""
    pipeline = diffusers.Flux2KleinPipeline
    given = torch.from_numpy(latents)
    tokens = theirs(
        hidden_states=pipeline._pack_latents(given),
        encoder_hidden_states=torch.from_numpy(text),
        timestep=torch.from_numpy(TIMES),
        img_ids=pipeline._prepare_latent_ids(given),
        txt_ids=pipeline._prepare_text_ids(torch.from_numpy(text)),
        guidance=None if guidance is None else torch.from_numpy(guidance),
        return_dict=False,
    )[0]
    return tokens.transpose(1, 2).reshape(latents.shape)


@pytest.mark.parametrize("is_guided", [False, True], ids=["klein", "with guidance"])
def test_the_prediction_and_its_gradients_are_pytorchs(is_guided: bool) -> None:
    network = Flux2Transformer({**SMALL, "guidance_embeds": is_guided}, jnp.float32)
    theirs = counterpart(network)
    latents, text = normal(2, 12, 3, 5), normal(2, 7, 20)
    guidance = np.array([1.0, 4.0], np.float32) if is_guided else None
    assert_as_pytorch(
        lambda params: network.apply(params, latents, TIMES, text, guidance),
        params_of(theirs, network),
        theirs,
        pytorchs(theirs, latents, text, guidance),
    )


def test_files_come_back_bit_for_bit() -> None:
    network = Flux2Transformer(SMALL, jnp.float32)
    assert_files_come_back(network, counterpart(network))


def test_the_published_model_has_pytorchs_names_and_shapes() -> None:
    assert_names_and_shapes(Flux2Transformer(KLEIN, jnp.bfloat16), 3.88e9)


def test_bfloat16_drifts_by_little() -> None:
    """Of the largest value, in a small model with random weights: 0.8 %."""
    network = Flux2Transformer(SMALL, jnp.float32)
    theirs = counterpart(network)
    latents, text = normal(2, 12, 3, 5), normal(2, 7, 20)
    half = dataclasses.replace(network, dtype=jnp.bfloat16)
    ours = jax.jit(half.apply)(params_of(theirs, network), latents, TIMES, text)
    assert ours.dtype == jnp.float32
    assert 1e-4 < relative_error(ours, pytorchs(theirs, latents, text, None)) < 0.03


def test_a_config_of_another_form_and_guidance_that_does_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="patches, and other channels out than in, are not known"):
        Flux2Transformer({**SMALL, "patch_size": 2}, jnp.float32)
    network = Flux2Transformer(SMALL, jnp.float32)
    with pytest.raises(ValueError, match="guidance goes with guidance_embeds"):
        network.apply({}, normal(2, 12, 3, 5), TIMES, normal(2, 7, 20), TIMES)
