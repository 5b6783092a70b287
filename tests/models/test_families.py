"""Stable Diffusion 1, 2 and XL, narrow but of the published structure, give PyTorch's numbers: outputs and gradients."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree
from ml_collections import ConfigDict

from offsetjax import presets
from offsetjax.config import default_config
from offsetjax.diffusion.schedule import add_noise, make_schedule, target
from offsetjax.errors import UserError
from offsetjax.formats.names import from_torch, torch_name
from offsetjax.models.autoencoder import Autoencoder
from offsetjax.models.text import TextEncoder
from offsetjax.models.unet import UNet
from tests import torch_models

FLOAT32 = jnp.dtype("float32")
PRESETS = {
    "sd1": presets.stable_diffusion_1,
    "sd2": presets.stable_diffusion_2,
    "sdxl": presets.stable_diffusion_xl,
}
NUM_TOKENS = 12


def narrow(family: str) -> ConfigDict:
    """A config with an eighth of the family's widths; of its depths, what tells them apart."""
    config = default_config()
    PRESETS[family](config, shrink=8)
    for section in (config.model.text_encoder, config.model.text_encoder_2):
        section.update(vocab_size=600, max_position_embeddings=NUM_TOKENS, num_hidden_layers=3)
    if family == "sdxl":
        config.model.unet.transformer_layers_per_block = (1, 2, 3)
    return config


def models(family: str, dtype: jnp.dtype = FLOAT32) -> dict[str, Any]:
    """The networks of `narrow`."""
    model = narrow(family).model
    parts = {
        "unet": UNet(model.unet.to_dict(), dtype),
        "vae": Autoencoder(model.vae.to_dict()),
        "text_encoder": TextEncoder(model.text_encoder.to_dict(), dtype, is_penultimate=family == "sdxl"),
    }
    if family == "sdxl":
        second = TextEncoder(model.text_encoder_2.to_dict(), dtype, is_penultimate=True, has_projection=True)
        parts["text_encoder_2"] = second
    return parts


def in_torch(model: Any) -> torch.nn.Module:
    """PyTorch's model of what our model says of itself, with random weights."""
    config = model.torch_config()
    if isinstance(model, TextEncoder):
        (name,) = config["architectures"]
        module = getattr(transformers, name)(transformers.CLIPTextConfig(**config))
    else:
        module = getattr(diffusers, config["_class_name"]).from_config(config)
    return torch_models.randomise(module)


def params_of(module: torch.nn.Module, model: Any) -> PyTree:
    """PyTorch's parameters as ours."""
    theirs = {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}
    like = flatten_dict(jax.eval_shape(model.init, jax.random.key(0)))
    assert {torch_name(path): math.prod(leaf.shape) for path, leaf in like.items()} == {
        name: parameter.size for name, parameter in theirs.items()
    }
    return unflatten_dict({path: from_torch(path, theirs[torch_name(path)]) for path in like})


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def relative_error(ours: Any, theirs: torch.Tensor) -> float:
    theirs = theirs.detach().float().numpy()
    return float(np.abs(np.asarray(ours, np.float32) - theirs).max() / np.abs(theirs).max())


def denoiser_inputs(unet: UNet) -> dict[str, Any]:
    config = unet.config
    inputs: dict[str, Any] = {
        "latents": normal(2, 4, 8, 8),
        "timesteps": np.array([3, 980], np.int32),
        "encoder_hidden_states": normal(2, 5, config["cross_attention_dim"]),
    }
    if unet.has_added_conditions:
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        time_ids = np.array([[512, 768, 0, 0, 1024, 1024], [1023, 2047, 333, 64, 896, 1152]], np.float32)
        inputs["added_conditions"] = {"text_embeds": normal(2, pooled), "time_ids": time_ids}
    return inputs


def torch_prediction(module: torch.nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    latents, timesteps, hidden, added = jax.tree.map(
        torch.tensor, (*list(inputs.values())[:3], inputs.get("added_conditions"))
    )
    return module(latents, timesteps, hidden, added_cond_kwargs=added).sample


@pytest.mark.parametrize("family", PRESETS)
def test_the_denoiser_and_its_gradients_are_pytorchs(family: str) -> None:
    """For the losses of ε and v: they differ in what the prediction is compared with."""
    unet = models(family)["unet"]
    theirs = in_torch(unet)
    inputs = denoiser_inputs(unet)
    clean, noise = inputs["latents"], normal(2, 4, 8, 8)[::-1].copy()
    config = narrow(family).schedule
    schedules = [make_schedule(**{**config, "prediction_type": kind}) for kind in ("epsilon", "v_prediction")]
    noisy, *wanted = (
        np.asarray(jax.vmap(lambda x, n, t, f=f, s=s: f(s, x, n, t))(clean, noise, inputs["timesteps"]))
        for f, s in [(add_noise, schedules[0]), *((target, schedule) for schedule in schedules)]
    )
    inputs["latents"] = noisy

    @jax.jit
    def gradient(params: PyTree, wanted: jax.Array) -> tuple[PyTree, jax.Array]:
        def loss(params: PyTree) -> tuple[jax.Array, jax.Array]:
            prediction = unet.apply(params, **inputs)
            return jnp.mean(jnp.square(prediction - wanted)), prediction

        return jax.grad(loss, has_aux=True)(params)

    params = params_of(theirs, unet)
    for kind in wanted:
        gradients, ours = gradient(params, kind)
        prediction = torch_prediction(theirs, inputs)
        assert relative_error(ours, prediction) < 1e-4
        theirs.zero_grad()
        torch.nn.functional.mse_loss(prediction, torch.tensor(kind)).backward()
        assert_gradients_agree(gradients, theirs)


def assert_gradients_agree(ours: PyTree, theirs: torch.nn.Module) -> None:
    expected = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    largest = max(np.abs(gradient).max() for gradient in expected.values())
    for path, found in flatten_dict(ours).items():
        gradient = from_torch(path, expected.pop(torch_name(path)))
        # Some gradients are zero but for rounding: a shift of all keys does not change a softmax.
        scale = max(np.abs(gradient).max(), 1e-4 * largest)
        print(torch_name(path), np.abs(found - gradient).max() / scale)
        assert np.abs(found - gradient).max() < 1e-3 * scale, torch_name(path)
    assert not expected
