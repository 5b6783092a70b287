"""A run that begins with an autoencoder of unknown scale gives it latents of mean 0 and deviation 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from offsetjax.data.source import open_source
from offsetjax.models.autoencoder import Autoencoder
from offsetjax.models.encode import to_unit_range
from offsetjax.models.pipeline import build
from offsetjax.storage.checkpoint import open_checkpoints
from offsetjax.training.setup import open_run
from offsetjax.training.states import first_state
from offsetjax.training.streams import open_stream
from tests.tiny import build_data, tiny_config


def test_standardising_changes_the_latents_and_not_the_pictures():
    vae = build(tiny_config()).autoencoder
    params = jax.jit(vae.init)(jax.random.key(0))
    pixels = jax.random.uniform(jax.random.key(1), (2, 3, 16, 16), minval=-1.0)
    mean, std = np.array([1.0, -2.0, 0.5, 0.0]), np.array([0.1, 3.0, 1.0, 0.5])
    new = Autoencoder.standardised(params, mean, std)
    (old_mean, old_log_variance), (new_mean, new_log_variance) = vae.encode(params, pixels), vae.encode(new, pixels)
    column = (slice(None), None, None)
    np.testing.assert_allclose(new_mean, (old_mean - mean[column]) / std[column], atol=1e-4)
    np.testing.assert_allclose(jnp.exp(new_log_variance), jnp.exp(old_log_variance) / std[column] ** 2, rtol=1e-4)
    np.testing.assert_allclose(vae.decode(new, new_mean), vae.decode(params, old_mean), atol=1e-4)


def test_a_scaling_factor_of_0_standardises_on_the_data(tmp_path):
    config = tiny_config(build_data(tmp_path), model__vae__scaling_factor=0.0)
    source = open_source(config.data.path)
    run = open_run(config, epath.Path(tmp_path / "run"), source)
    assert run.config.model.vae.scaling_factor == 1.0
    pipeline, frozen = run.pipeline, run.frozen
    config.data.random_flip = False
    batches = open_stream(config, pipeline, source).iterator(0)
    pixels = np.concatenate([next(batches)["pixels"] for _ in range(8)])
    batches.close()
    latents = pipeline.autoencoder.encode(frozen["vae"], to_unit_range(pixels))[0]
    np.testing.assert_allclose(latents.mean((0, 2, 3)), 0.0, atol=0.02)
    np.testing.assert_allclose(latents.std((0, 2, 3)), 1.0, atol=0.02)


def test_the_log_says_the_strength_that_is_in_effect(tmp_path, caplog):
    config = tiny_config(build_data(tmp_path), noise__offset_strength=0.3, noise__reference_resolution=64)
    source = open_source(config.data.path)
    run = open_run(config, epath.Path(tmp_path / "run"), source)
    with open_checkpoints(tmp_path / "run") as manager, caplog.at_level("INFO", "offsetjax"):
        first_state(run, manager, open_stream(config, run.pipeline, source))
    # Pictures of 16 px, a quarter of the reference's side: c² = 0.3² + 1/1024 - 1/64.
    assert "noise: offset, strength 0.2745 for 8x8 latents (c √N = 2.196)" in caplog.text


@pytest.mark.parametrize("strength", [0.0, 0.1])
def test_reopening_gives_the_same_config_and_frozen_parts(tmp_path, strength):
    config = tiny_config(build_data(tmp_path), noise__offset_strength=strength, model__vae__scaling_factor=0.0)
    source = open_source(config.data.path)
    first, second = (open_run(config, epath.Path(tmp_path / "run"), source) for _ in range(2))
    assert first.config == second.config
    jax.tree.map(np.testing.assert_array_equal, first.frozen, second.frozen)
