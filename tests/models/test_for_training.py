"""The pipeline as it is trained: kernels that the device has, and the types that are enough."""

import pathlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from offsetjax.config import default_config
from offsetjax.config.presets import stable_diffusion_1, stable_diffusion_xl
from offsetjax.errors import UserError
from offsetjax.models.pipeline import Pipeline, build, for_training
from offsetjax.models.trained import load_model

ROOT = pathlib.Path(__file__).parents[2]


def _trained(config: ConfigDict, platform: str = "tpu", shares: int = 1) -> Pipeline:
    return for_training(build(config), config.data.resolution, platform, shares)


def test_the_denoiser_has_the_settings_also_under_adapters() -> None:
    config = default_config()
    config.model.remat, config.lora.rank = "blocks", 4
    unet = _trained(config).denoiser.model
    assert (unet.tracing.kernel, unet.tracing.remat) == ("splash", "blocks")
    plain = build(config).denoiser
    assert (plain.tracing.kernel, plain.tracing.remat) == ("xla", "none")  # pictures are drawn without


@pytest.mark.parametrize(
    ("setting", "shares", "is_scanned"),
    [("auto", 1, False), ("auto", 8, True), ("always", 1, True), ("never", 64, False)],
)
def test_layers_are_scanned_where_their_weights_are_split(setting: str, shares: int, is_scanned: bool) -> None:
    config = default_config()
    config.model.scan_layers = setting
    trained = _trained(config, shares=shares)
    assert [trained.parts[part].tracing.is_scanned for part in ("unet", "text_encoder")] == [is_scanned] * 2


def test_pictures_are_encoded_in_the_compute_type_but_for_sdxl() -> None:
    for preset, dtype in ((stable_diffusion_1, jnp.bfloat16), (stable_diffusion_xl, jnp.float32)):
        config = default_config()
        preset(config)
        assert _trained(config).autoencoder.dtype == dtype
        assert build(config).autoencoder.dtype == jnp.float32
    config = default_config()
    config.task = "autoencoder"
    assert _trained(config).autoencoder.dtype == jnp.float32


def test_the_compute_type_is_enough_for_latents() -> None:
    """Least of all may it move their mean, beside an offset of 0.1: of the bundled autoencoder, which was trained."""
    model = load_model(ROOT / "configs/article/pretrained")
    rng = np.random.default_rng(0)
    blobs = jax.image.resize(rng.normal(size=(16, 3, 8, 8)), (16, 3, 64, 64), "cubic")
    pixels = np.clip(rng.uniform(-1, 1, (16, 3, 1, 1)) + 0.3 * blobs, -1, 1).astype(np.float32)
    vaes = model.pipeline.autoencoder, replace(model.pipeline.autoencoder, dtype=jnp.bfloat16)
    exact, rounded = (np.asarray(jax.jit(vae.encode)(model.frozen["vae"], pixels)[0]) for vae in vaes)
    apart = rounded - exact
    assert apart.std() < 0.02 * exact.std()
    assert np.abs(apart.mean((2, 3))).mean() < 0.01 * exact.std()


@pytest.mark.parametrize(
    ("attention", "resolution", "platform", "message"),
    [
        ("splash", 512, "cpu", "model.attention = splash: splash is a kernel for TPUs, and this is a cpu; auto"),
        ("cudnn", 512, "tpu", "model.attention = cudnn: cudnn has kernels for GPUs .* this is a tpu"),
        ("splash", 128, "tpu", "takes 1024 positions and more, .* = 128 gives the blocks 256, 64, 16, 4; auto takes"),
    ],
)
def test_a_kernel_that_cannot_apply_is_refused(attention: str, resolution: int, platform: str, message: str) -> None:
    config = default_config()
    config.model.attention, config.data.resolution = attention, resolution
    with pytest.raises(UserError, match=message):
        _trained(config, platform)


def test_splash_takes_pictures_of_a_size_that_does_not_suit_its_blocks() -> None:
    config = default_config()
    config.model.attention, config.data.resolution = "splash", 704
    assert _trained(config, "tpu").denoiser.tracing.kernel == "splash"
