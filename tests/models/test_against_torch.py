"""Each network, loaded from what PyTorch wrote, gives PyTorch's numbers: outputs, and the denoiser's gradients."""

import pathlib
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jaxtyping import PyTree
from ml_collections import ConfigDict

from offsetjax.config import default_config
from offsetjax.formats.names import params_to_tensors
from offsetjax.models.autoencoder import standardised
from offsetjax.models.pipeline import build, load_params, resolve, save_part
from offsetjax.models.unet import UNet
from tests import torch_models

CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
UNETS = {
    "8 groups": {},
    "32 groups, linear projection": {
        "norm_num_groups": 32,
        "block_out_channels": (32, 64),
        "use_linear_projection": True,
        "attention_head_dim": 4,
    },
    "2 layers, all blocks attend": {
        "layers_per_block": 2,
        "down_block_types": (CROSS[0],) * 2,
        "up_block_types": (CROSS[1],) * 2,
    },
}


def load(directory: pathlib.Path, part: str, saved: Any) -> tuple[ConfigDict, Any, PyTree]:
    """A part as a user loads it: written by PyTorch, its architecture and its weights read by ours."""
    saved.save_pretrained(directory / part)
    torch_models.scheduler().save_pretrained(directory / "scheduler")
    config = default_config()
    config.model.pretrained, config.model.dtype = str(directory), "float32"
    config.model.from_scratch = tuple({"unet", "vae", "text_encoder"} - {part})
    config = resolve(config)
    model = getattr(build(config), part)
    return config, model, load_params(directory, part, model)


def relative_error(ours: Any, theirs: torch.Tensor) -> float:
    theirs = theirs.detach().numpy()
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name.startswith("2 layers") else ()) for name in UNETS]
)
def test_the_denoiser_and_its_gradients_are_pytorchs(name: str, tmp_path: pathlib.Path) -> None:
    theirs = torch_models.unet(**UNETS[name])
    _, unet, params = load(tmp_path, "unet", theirs)
    latents, hidden, timesteps = normal(2, 4, 8, 8), normal(2, 5, 24), np.array([3, 980], np.int32)
    wanted = normal(2, 4, 8, 8)[::-1].copy()

    def loss(params: PyTree) -> tuple[jax.Array, jax.Array]:
        prediction = unet.apply(params, latents, timesteps, hidden)
        return jnp.mean(jnp.square(prediction - wanted)), prediction

    gradients, ours = jax.jit(jax.grad(loss, has_aux=True))(params)
    prediction = theirs(torch.from_numpy(latents), torch.from_numpy(timesteps), torch.from_numpy(hidden)).sample
    torch.nn.functional.mse_loss(prediction, torch.from_numpy(wanted)).backward()

    assert relative_error(ours, prediction) < 1e-4
    found = params_to_tensors(gradients)
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for tensor, gradient in expected.items():
        # Some gradients are zero but for rounding: a shift of all keys does not change a softmax.
        scale = max(float(gradient.abs().max()), 1e-4 * largest)
        assert np.abs(found[tensor] - gradient.numpy()).max() < 1e-3 * scale, tensor


def test_bfloat16_computes_its_convolutions_in_bfloat16_and_returns_float32(tmp_path: pathlib.Path) -> None:
    theirs = torch_models.unet()
    _, unet, params = load(tmp_path, "unet", theirs)
    inputs = normal(2, 4, 8, 8), np.array([3, 980], np.int32), normal(2, 5, 24)
    half = UNet(unet.config, jnp.dtype("bfloat16"))
    graph = str(jax.make_jaxpr(lambda *inputs: half.apply(params, *inputs))(*inputs))
    convolutions = re.findall(r":(\w+)\[[\d,]*\] = conv_general_dilated\[", graph)
    assert len(convolutions) > 15 and set(convolutions) == {"bf16"}
    output = jax.jit(half.apply)(params, *inputs)
    assert output.dtype == jnp.float32
    assert relative_error(output, theirs(*map(torch.from_numpy, inputs)).sample) < 0.1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "norm_num_groups": 32,
            "block_out_channels": (32, 64),
            "mid_block_add_attention": False,
            "layers_per_block": 2,
        },
    ],
    ids=["attention", "no attention"],
)
def test_the_autoencoder_is_pytorchs(changes: dict, tmp_path: pathlib.Path) -> None:
    theirs = torch_models.vae(**changes)
    _, vae, params = load(tmp_path, "vae", theirs)
    pixels, latents = normal(2, 3, 16, 16), normal(2, 4, 8, 8)
    with torch.no_grad():
        posterior = theirs.encode(torch.from_numpy(pixels)).latent_dist
        decoded = theirs.decode(torch.from_numpy(latents)).sample
    mean, log_variance = jax.jit(vae.encode)(params, pixels)
    assert vae.downscale == 2
    assert relative_error(mean, posterior.mean) < 1e-4
    assert relative_error(log_variance, posterior.logvar) < 1e-4
    assert relative_error(jax.jit(vae.decode)(params, latents), decoded) < 1e-4


def test_standardised_latents_have_mean_0_and_deviation_1_and_decode_to_the_same_picture(
    tmp_path: pathlib.Path,
) -> None:
    _, vae, params = load(tmp_path, "vae", torch_models.vae())
    pixels = normal(8, 3, 16, 16)
    encode, decode = jax.jit(vae.encode), jax.jit(vae.decode)
    mean, log_variance = (np.asarray(moment) for moment in encode(params, pixels))
    shift, scale = mean.mean((0, 2, 3)), mean.std((0, 2, 3))
    new = standardised(params, shift, scale)
    latents, new_log_variance = (np.asarray(moment) for moment in encode(new, pixels))
    np.testing.assert_allclose(latents.mean((0, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(latents.std((0, 2, 3)), 1, atol=1e-4)
    np.testing.assert_allclose(
        np.exp(0.5 * new_log_variance), np.exp(0.5 * log_variance) / scale[:, None, None], rtol=1e-3
    )
    np.testing.assert_allclose(decode(new, latents), decode(params, mean), atol=1e-4)


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_the_text_encoder_is_pytorchs(hidden_act: str, tmp_path: pathlib.Path) -> None:
    theirs = torch_models.text_encoder(hidden_act=hidden_act)
    config, text_encoder, params = load(tmp_path, "text_encoder", theirs)
    assert config.model.text_encoder.hidden_act == hidden_act
    input_ids = np.random.default_rng(0).integers(0, 600, (3, 12), dtype=np.int32)
    input_ids[0, 5:] = 599  # padding, which is attended to
    with torch.no_grad():
        hidden = theirs(torch.from_numpy(input_ids)).last_hidden_state
    assert relative_error(jax.jit(text_encoder.apply)(params, input_ids), hidden) < 1e-4


@pytest.mark.parametrize(
    ("part", "make"),
    [("unet", torch_models.unet), ("vae", torch_models.vae), ("text_encoder", torch_models.text_encoder)],
)
def test_pytorch_loads_a_model_that_begins_here(part: str, make: Callable, tmp_path: pathlib.Path) -> None:
    """The names and shapes of all parameters, without a checkpoint to copy them from."""
    _, model, _ = load(tmp_path / "theirs", part, make())
    drawn = jax.tree.map(lambda leaf: normal(*leaf.shape), jax.eval_shape(model.init, jax.random.key(0)))
    save_part(tmp_path / "ours", part, model, drawn)
    again, report = type(make()).from_pretrained(tmp_path / "ours" / part, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert sum(p.numel() for p in again.parameters()) == sum(leaf.size for leaf in jax.tree.leaves(drawn))


def test_building_the_models_prints_nothing() -> None:
    """Both libraries announce the end of their Flax classes, one line a class; nobody could act on it."""
    program = """
import jax
from offsetjax.config import default_config
from offsetjax.models.pipeline import build
config = default_config()
config.model.text_encoder.num_hidden_layers = 1
pipeline = build(config)
for model in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
    jax.eval_shape(model.init, jax.random.key(0))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("", "")


def test_diffusers_is_the_version_whose_numerics_are_corrected() -> None:
    assert diffusers.__version__.startswith("0.39.")
