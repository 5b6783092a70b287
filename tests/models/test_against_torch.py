"""Small networks of any architecture give PyTorch's numbers; and what our networks promise besides."""

import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jaxtyping import Array, PyTree

from offsetjax.config import default_config
from offsetjax.models.autoencoder import Autoencoder
from offsetjax.models.unet import UNet
from tests import tiny, torch_models
from tests.torch_models import counterpart, gradient_errors, params_of, relative_error

FLOAT32 = jnp.dtype("float32")
UNETS = {
    "8 groups": {},
    "linear projection, sizes": {
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
    },
}


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with tiny.quick_compilation(pathlib.Path(tmp_path_factory.getbasetemp())):
        yield


def config_of(part: str, values: dict[str, Any]) -> dict[str, Any]:
    """The default config of a part with other values."""
    return {**default_config().model[part].to_dict(), **values}


def unet_of(**changes: Any) -> UNet:
    return UNet(config_of("unet", {**torch_models.UNET, **changes}), FLOAT32)


def vae_of(**changes: Any) -> Autoencoder:
    return Autoencoder(config_of("vae", {**torch_models.VAE, **changes}))


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", UNETS)
def test_the_denoiser_and_its_gradients_are_pytorchs(name: str) -> None:
    unet = unet_of(**UNETS[name])
    theirs = counterpart(unet)
    latents, hidden, timesteps = normal(2, 4, 8, 8), normal(2, 5, 24), np.array([3, 980], np.int32)
    wanted = normal(2, 4, 8, 8)[::-1].copy()
    added = {"text_embeds": normal(2, 16), "time_ids": 512 + normal(6, 2).T} if unet.has_added_conditions else None

    def loss(params: PyTree) -> tuple[Array, Array]:
        prediction = unet.apply(params, latents, timesteps, hidden, added)
        return jnp.mean(jnp.square(prediction - wanted)), prediction

    gradients, ours = jax.jit(jax.grad(loss, has_aux=True))(params_of(theirs, unet))
    *inputs, conditions = jax.tree.map(torch.from_numpy, (latents, timesteps, hidden, added))
    prediction = theirs(*inputs, added_cond_kwargs=conditions).sample
    torch.nn.functional.mse_loss(prediction, torch.from_numpy(wanted)).backward()

    assert relative_error(ours, prediction) < 1e-4
    errors = gradient_errors(gradients, theirs)
    assert max(errors.values()) < 1e-3, errors


def test_bfloat16_computes_its_convolutions_in_bfloat16_and_returns_float32() -> None:
    unet = unet_of()
    theirs = counterpart(unet)
    params = params_of(theirs, unet)
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
def test_the_autoencoder_is_pytorchs(changes: dict[str, Any]) -> None:
    vae = vae_of(**changes)
    theirs = counterpart(vae)
    params = params_of(theirs, vae)
    pixels, latents = normal(2, 3, 16, 16), normal(2, 4, 8, 8)
    with torch.no_grad():
        posterior = theirs.encode(torch.from_numpy(pixels)).latent_dist
        decoded = theirs.decode(torch.from_numpy(latents)).sample
    mean, log_variance = jax.jit(vae.encode)(params, pixels)
    assert vae.downscale == 2
    assert relative_error(mean, posterior.mean) < 1e-4
    assert relative_error(log_variance, posterior.logvar) < 1e-4
    assert relative_error(jax.jit(vae.decode)(params, latents), decoded) < 1e-4


def test_standardised_latents_have_mean_0_and_deviation_1_and_decode_to_the_same_picture() -> None:
    vae = vae_of()
    params = params_of(counterpart(vae), vae)
    pixels = normal(8, 3, 16, 16)
    encode, decode = jax.jit(vae.encode), jax.jit(vae.decode)
    mean, log_variance = (np.asarray(moment) for moment in encode(params, pixels))
    shift, scale = mean.mean((0, 2, 3)), mean.std((0, 2, 3))
    new = Autoencoder.standardised(params, shift, scale)
    latents, new_log_variance = (np.asarray(moment) for moment in encode(new, pixels))
    np.testing.assert_allclose(latents.mean((0, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(latents.std((0, 2, 3)), 1, atol=1e-4)
    np.testing.assert_allclose(
        np.exp(0.5 * new_log_variance), np.exp(0.5 * log_variance) / scale[:, None, None], rtol=1e-3
    )
    np.testing.assert_allclose(decode(new, latents), decode(params, mean), atol=1e-4)


def test_building_the_models_prints_nothing() -> None:
    """diffusers announces the end of its Flax classes, one line a class; nobody could act on it."""
    program = """
import jax
from offsetjax.config import default_config
from offsetjax.models.pipeline import build
config = default_config()
config.model.text_encoder.num_hidden_layers = 1
pipeline = build(config)
for model in pipeline.parts.values():
    jax.eval_shape(model.init, jax.random.key(0))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("", "")


def test_diffusers_is_the_version_whose_numerics_are_corrected() -> None:
    assert diffusers.__version__.startswith("0.39.")
