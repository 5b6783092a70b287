"""Stable Diffusion 1, 2 and XL, narrow but of the published structure, give PyTorch's outputs and gradients."""

import functools
import math
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from offsetjax.config import default_config, presets
from offsetjax.diffusion.process import add_noise, make_process
from offsetjax.errors import UserError
from offsetjax.models.autoencoder import Autoencoder
from offsetjax.models.text import TextEncoder
from offsetjax.models.unet import UNet
from tests import tiny
from tests.torch_models import counterpart, gradient_errors, params_of, relative_error

PRESETS = {
    "sd1": presets.stable_diffusion_1,
    "sd2": presets.stable_diffusion_2,
    "sdxl": presets.stable_diffusion_xl,
}
TEXT_ENCODERS = [("sd1", "text_encoder"), ("sd2", "text_encoder"), ("sdxl", "text_encoder"), ("sdxl", "text_encoder_2")]
NUM_TOKENS, END_OF_TEXT = 12, 599


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with tiny.quick_compilation(pathlib.Path(tmp_path_factory.getbasetemp())):
        yield


def narrow(family: str) -> ConfigDict:
    """A config with an eighth of the family's widths; of its depths, what tells them apart."""
    config = default_config()
    PRESETS[family](config, shrink=8)
    for section in (config.model.text_encoder, config.model.text_encoder_2):
        section.update(vocab_size=600, max_position_embeddings=NUM_TOKENS, num_hidden_layers=3)
    if family == "sdxl":
        config.model.unet.transformer_layers_per_block = (1, 2, 3)
    return config


def build(config: ConfigDict, part: str, dtype: str = "float32") -> Any:
    section = config.model[part].to_dict()
    if part == "vae":
        return Autoencoder(section)
    if part == "unet":
        return UNet(section, jnp.dtype(dtype))
    return TextEncoder(section, jnp.dtype(dtype), config.model.family == "sdxl", part == "text_encoder_2")


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def denoiser_inputs(unet: UNet) -> tuple[Any, ...]:
    config = unet.config
    inputs = normal(2, 4, 16, 16), np.array([3, 980], np.int32), normal(2, 5, config["cross_attention_dim"])
    if not unet.has_added_conditions:
        return *inputs, None
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    time_ids = np.array([[512, 768, 0, 0, 1024, 1024], [1023, 2047, 333, 64, 896, 1152]], np.float32)
    return *inputs, {"text_embeds": normal(2, pooled), "time_ids": time_ids}


def torch_prediction(module: torch.nn.Module, inputs: tuple[Any, ...]) -> torch.Tensor:
    *inputs, added = jax.tree.map(torch.tensor, inputs)
    return module(*inputs, added_cond_kwargs=added).sample


@pytest.mark.parametrize("family", PRESETS)
def test_the_denoiser_is_pytorchs(family: str) -> None:
    unet = build(narrow(family), "unet")
    theirs = counterpart(unet)
    inputs = denoiser_inputs(unet)
    with torch.no_grad():
        expected = torch_prediction(theirs, inputs)
    assert relative_error(jax.jit(unet.apply)(params_of(theirs, unet), *inputs), expected) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("family", PRESETS)
def test_the_denoiser_and_the_gradients_of_either_loss_are_pytorchs(family: str) -> None:
    config = narrow(family)
    unet = build(config, "unet")
    theirs = counterpart(unet)
    latents, timesteps, *conditions = denoiser_inputs(unet)
    noise = latents[::-1].copy()

    @jax.jit
    def gradient(params: PyTree, noisy: Array, wanted: Array) -> tuple[PyTree, Array]:
        def loss(params: PyTree) -> tuple[Array, Array]:
            prediction = unet.apply(params, noisy, timesteps, *conditions)
            return jnp.mean(jnp.square(prediction - wanted)), prediction

        return jax.grad(loss, has_aux=True)(params)

    for kind in ("epsilon", "v_prediction"):
        process = make_process({**config.schedule, "prediction_type": kind})
        noisy = np.array(jax.vmap(functools.partial(add_noise, process))(latents, noise, timesteps))
        wanted = np.array(jax.vmap(process.target)(latents, noise, jnp.zeros(len(noise)), timesteps))
        gradients, ours = gradient(params_of(theirs, unet), noisy, wanted)
        theirs.zero_grad()
        prediction = torch_prediction(theirs, (noisy, timesteps, *conditions))
        torch.nn.functional.mse_loss(prediction, torch.from_numpy(wanted)).backward()
        assert relative_error(ours, prediction) < 1e-4
        errors = gradient_errors(gradients, theirs)
        assert max(errors.values()) < 1e-3, errors


def test_the_autoencoder_is_pytorchs() -> None:
    vae = build(narrow("sdxl"), "vae")
    theirs = counterpart(vae)
    params, pixels, latents = params_of(theirs, vae), normal(2, 3, 32, 32), normal(2, 4, 4, 4)
    with torch.no_grad():
        posterior = theirs.encode(torch.from_numpy(pixels)).latent_dist
        decoded = theirs.decode(torch.from_numpy(latents)).sample
    ours = jax.jit(lambda params: (*vae.encode(params, pixels), vae.decode(params, latents)))(params)
    assert max(map(relative_error, ours, (posterior.mean, posterior.logvar, decoded))) < 1e-4


@pytest.mark.slow
def test_the_autoencoders_gradients_are_pytorchs() -> None:
    """Of a loss that looks at the moments and at what is decoded from the mean."""
    vae = build(narrow("sdxl"), "vae")
    theirs = counterpart(vae)
    pixels = normal(2, 3, 32, 32)

    @jax.jit
    @jax.grad
    def gradient(params: PyTree) -> Array:
        mean, log_variance = vae.encode(params, pixels)
        return jnp.square(vae.decode(params, mean) - pixels).mean() + jnp.square(log_variance).mean()

    posterior = theirs.encode(torch.from_numpy(pixels)).latent_dist
    error = (theirs.decode(posterior.mean).sample - torch.from_numpy(pixels)).square().mean()
    (error + posterior.logvar.square().mean()).backward()
    errors = gradient_errors(gradient(params_of(theirs, vae)), theirs)
    assert max(errors.values()) < 1e-3, errors


def test_pytorch_is_told_to_compute_the_autoencoder_in_float32() -> None:
    """SDXL's overflows in float16; its pipeline heeds this."""
    assert build(narrow("sdxl"), "vae").torch_config()["force_upcast"]


def captions() -> np.ndarray:
    """Captions as the tokenizers give them: one padded with the end of text, one with zeros, one cut."""
    input_ids = np.random.default_rng(0).integers(1, END_OF_TEXT - 1, (3, NUM_TOKENS), dtype=np.int32)
    input_ids[:, 0] = END_OF_TEXT - 1
    input_ids[0, 5:] = END_OF_TEXT
    input_ids[1, 7:] = 0
    input_ids[1, 6] = input_ids[2, -1] = END_OF_TEXT
    return input_ids


@pytest.mark.parametrize(("family", "part"), TEXT_ENCODERS)
def test_the_text_encoders_and_their_gradients_are_pytorchs(family: str, part: str) -> None:
    text_encoder = build(narrow(family), part)
    theirs = counterpart(text_encoder)
    input_ids = captions()

    @jax.jit
    def gradient(params: PyTree) -> tuple[PyTree, list[Array]]:
        def loss(params: PyTree) -> tuple[Array, list[Array]]:
            outputs = [output for output in text_encoder.apply(params, input_ids) if output is not None]
            return sum(jnp.square(output).sum() for output in outputs), outputs

        return jax.grad(loss, has_aux=True)(params)

    gradients, ours = gradient(params_of(theirs, text_encoder))
    output = theirs(torch.from_numpy(input_ids), output_hidden_states=True)
    expected = [output.hidden_states[-2] if family == "sdxl" else output.last_hidden_state]
    expected += [output.text_embeds] if part == "text_encoder_2" else []
    sum(one.square().sum() for one in expected).backward()
    assert len(ours) == len(expected)
    assert max(map(relative_error, ours, expected)) < 1e-4
    errors = gradient_errors(gradients, theirs)
    assert max(errors.values()) < 1e-3, errors


def test_the_caption_as_a_whole_is_that_of_a_config_which_names_the_end_of_text() -> None:
    """Old configs, and ours, say 2 and mean the greatest id; later ones give the id."""
    text_encoder = build(narrow("sdxl"), "text_encoder_2")
    theirs = counterpart(text_encoder)
    assert theirs.config.eos_token_id == 2
    theirs.text_model.eos_token_id = END_OF_TEXT
    with torch.no_grad():
        expected = theirs(torch.from_numpy(captions())).text_embeds
    _, ours = jax.jit(text_encoder.apply)(params_of(theirs, text_encoder), captions())
    assert relative_error(ours, expected) < 1e-4


def test_devices_exchange_nothing_to_encode_their_captions() -> None:
    text_encoder = build(narrow("sdxl"), "text_encoder_2")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated, split = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in ((), ("data",)))
    apply = jax.jit(text_encoder.apply, in_shardings=(replicated, split), out_shardings=split)
    params = jax.eval_shape(text_encoder.init, jax.random.key(0))
    program = apply.lower(params, jax.ShapeDtypeStruct((16, NUM_TOKENS), jnp.int32)).compile().as_text()
    assert not re.findall(r" (all-gather|all-reduce|all-to-all|collective-permute)\(", program)


def a_small_unet(dtype: str = "float32") -> UNet:
    config = tiny.tiny_config().model.unet
    config.update(addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64)
    return UNet(config.to_dict(), jnp.dtype(dtype))


def test_a_denoiser_that_wants_sizes_does_not_run_without() -> None:
    unet = a_small_unet()
    params = jax.eval_shape(unet.init, jax.random.key(0))
    inputs = normal(1, 4, 8, 8), np.array([3]), normal(1, 5, 16)
    for added in (None, {}, {"text_embeds": normal(1, 16)}):
        with pytest.raises(ValueError, match="needs text_embeds and time_ids"):
            jax.eval_shape(unet.apply, params, *inputs, added)


def test_sizes_are_not_rounded_to_the_compute_type() -> None:
    """bfloat16 has no 1023."""
    unet = a_small_unet("bfloat16")
    params = jax.tree.map(lambda leaf: normal(*leaf.shape), jax.eval_shape(unet.init, jax.random.key(0)))
    added = {"text_embeds": np.ones((2, 16)), "time_ids": np.array([[1023.0] * 6, [1024.0] * 6])}
    inputs = np.ones((2, 4, 8, 8)), np.array([3, 3]), np.ones((2, 5, 16))
    first, second = jax.jit(unet.apply)(params, *inputs, added)
    assert np.abs(first - second).max() > 0


def test_transformer_layers_are_given_for_each_block() -> None:
    config = narrow("sdxl").model.unet
    config.transformer_layers_per_block = (1, 2)
    with pytest.raises(UserError, match=r"^config: model.unet.transformer_layers_per_block has 2 values for 3 blocks;"):
        jax.eval_shape(UNet(config.to_dict(), jnp.dtype("float32")).init, jax.random.key(0))


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("sd1", {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}),
        ("sd2", {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840}),
        (
            "sdxl",
            {
                "unet": 2_567_463_684,
                "vae": 83_653_863,
                "text_encoder": 123_060_480,
                "text_encoder_2": 694_659_840,
            },
        ),
    ],
)
def test_a_whole_family_has_the_published_number_of_parameters(family: str, expected: dict[str, int]) -> None:
    config = default_config()
    PRESETS[family](config)
    for part, number in expected.items():
        shapes = jax.eval_shape(build(config, part).init, jax.random.key(0))
        assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == number, part
