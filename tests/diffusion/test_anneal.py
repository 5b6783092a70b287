"""Noise that becomes plain over the last part of a training, and with it whatever depends on it."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from offsetjax.config import validate
from offsetjax.diffusion.noise import weight_at
from offsetjax.errors import UserError
from offsetjax.exporting.comfyui import comfyui_node
from offsetjax.exporting.export import write_spectrum
from offsetjax.exporting.metadata import header
from offsetjax.exporting.model_card import model_card
from offsetjax.models.pipeline import build
from offsetjax.sampling.reach import matched_sampler, start_warning, training_advice
from tests.exporting.test_model_card import NOISES, powers
from tests.tiny import start_of, tiny_config
from tests.training.test_objective import _config, _look

STEPS, SHARE = 1000, 0.4
ANNEALED = {"train__steps": STEPS, "noise__anneal": SHARE}
MIDDLE = 800  # where half is left


@pytest.mark.parametrize(("step", "weight"), [(0, 1), (600, 1), (700, 0.5 + 0.5**1.5), (800, 0.5), (1000, 0)])
def test_the_weight_at_a_step(step: int, weight: float) -> None:
    assert weight_at(step, STEPS, SHARE) == pytest.approx(weight, abs=1e-12)
    traced = jax.jit(lambda step: weight_at(step, STEPS, SHARE))(jnp.int32(step))
    assert traced.dtype == jnp.float32 and float(traced) == pytest.approx(weight, abs=1e-6)
    assert weight_at(step, STEPS, 0.0) == 1.0


def test_the_objective_has_the_noise_of_its_step() -> None:
    plain = {step: _look(_config(), step=step) for step in (0, MIDDLE, STEPS)}
    whole = {step: _look(_config(noise__offset_strength=0.5), step=step) for step in plain}
    annealed = {step: _look(_config(noise__offset_strength=0.5, **ANNEALED), step=step) for step in plain}
    assert jnp.array_equal(annealed[0].target, whole[0].target) and jnp.array_equal(annealed[0].noisy, whole[0].noisy)
    assert jnp.array_equal(annealed[STEPS].target, plain[STEPS].target)
    shift = np.asarray(whole[MIDDLE].target - plain[MIDDLE].target)
    half = np.asarray(annealed[MIDDLE].target - plain[MIDDLE].target)
    assert np.abs(shift).max() > 1
    np.testing.assert_allclose(half, shift / 2, atol=1e-5)


@pytest.mark.parametrize("process", ["variance_preserving", "flow"])
def test_without_it_a_step_has_the_same_bits(process: str) -> None:
    changes = {"schedule__process": process, "noise__offset_strength": 0.5, "loss__min_snr_gamma": 5.0}
    whole, early = (_look(_config(**changes, **more), step=7) for more in ({}, ANNEALED))
    assert jnp.array_equal(whole.losses, _look(_config(**changes, noise__anneal=0.0), step=7).losses)
    np.testing.assert_allclose(whole.losses, early.losses, rtol=1e-6)


def test_min_snr_weights_know_the_variance_that_is_left() -> None:
    """`min(SNR_t / s², γ) / SNR_t` with s² = 1 + w² c²."""
    changes = {"noise__offset_strength": 2.0, **ANNEALED}
    error = _look(_config(**changes), step=MIDDLE)
    weighted = _look(_config(**changes, loss__min_snr_gamma=0.01), step=MIDDLE)
    late = np.asarray(error.timesteps) > 950  # where s² decides on the weight, 1 / s²
    ratio = np.asarray(weighted.losses / error.losses)[late]
    assert ratio.size and ratio.max() == pytest.approx(1 / (1 + 0.5**2 * 2.0**2), rel=1e-4)


@pytest.mark.parametrize("name", ["random", "adaptive", "pyramid"])
def test_half_of_it_has_the_power_of_theory(name: str) -> None:
    config = tiny_config(**NOISES[name], **ANNEALED)
    pipeline = build(config)
    whole, half = (pipeline.noising.noise(step) for step in (0, MIDDLE))
    expected = 1 + (whole.power(8, 8) - 1) / 4
    np.testing.assert_allclose(half.power(8, 8), expected)
    assert half.variance(8, 8) == pytest.approx(1 + (whole.variance(8, 8) - 1) / 4)
    keys = jax.random.split(jax.random.key(0), 4096)
    drawn = np.asarray(jax.jit(lambda keys, step: start_of(pipeline, config, keys, step))(keys, jnp.int32(MIDDLE)))
    assert np.abs(powers(drawn) / np.broadcast_to(expected, powers(drawn).shape) - 1).max() < 5 * np.sqrt(6 / 4096)
    np.testing.assert_allclose(start_of(pipeline, config, keys[:9], MIDDLE), drawn[:9], atol=1e-5)


@pytest.mark.parametrize("name", ["offset", "spectral", "adaptive", "pyramid"])
def test_at_the_end_the_start_is_plain_and_all_that_is_exported_says_so(name: str, tmp_path: pathlib.Path) -> None:
    config = tiny_config(**NOISES[name], **ANNEALED, sample__sampler="euler_ancestral")
    pipeline = build(config)
    keys = jax.random.split(jax.random.key(0), 9)
    plain = jax.vmap(lambda key: jax.random.normal(jax.random.split(key)[0], (4, 8, 8)))(keys)
    assert jnp.array_equal(start_of(pipeline, config, keys, STEPS), plain)
    traced = jax.jit(lambda keys, step: start_of(pipeline, config, keys, step))(keys, jnp.int32(STEPS))
    np.testing.assert_allclose(traced, plain, atol=2e-6)
    settings = (pipeline, config.sample, config.data.resolution)
    card = model_card(*settings, STEPS)
    assert "PyTorch's default start is the right one" in card and "over the last 0.4 of it the noise became" in card
    assert "Training noise: plain." in card and "strength =" not in card and "Do not start" not in card
    assert "PyTorch's default start is the right one" not in model_card(*settings, STEPS - 1)
    write_spectrum(tmp_path, pipeline, config.data.resolution, STEPS)
    assert list(tmp_path.iterdir()) == []
    given = config.sample.sampler
    early, late = (matched_sampler(pipeline, given, pipeline.noising.noise(step)) for step in (MIDDLE, STEPS))
    assert late == "euler_ancestral" != early
    said = header(pipeline, config, STEPS, "diffusers", "model")
    unused = ("ss_adaptive_noise_scale", "ss_multires_noise_iterations", "ss_multires_noise_discount")
    assert {said[name] for name in unused} == {"None"}
    assert said["ss_noise_offset_random_strength"] == "False"
    assert said["ss_noise_offset"] == "0.0" and "from plain noise, the noise of training" in said["offsetjax.start"]
    config.sample.start_noise = "plain"
    assert list(start_warning(*settings, STEPS)) == []


@pytest.mark.parametrize("name", ["adaptive", "pyramid"])
def test_a_node_of_a_model_that_was_not_annealed_to_the_end(name: str) -> None:
    config = tiny_config(**NOISES[name], **ANNEALED)
    pipeline, names = build(config), {}
    exec(compile(comfyui_node(pipeline, config.data.resolution, "x", MIDDLE), "node.py", "exec"), names)
    keys = jax.random.split(jax.random.key(3), 6)

    def draws(key: jax.Array) -> tuple[jax.Array, ...]:
        pixel_key, offset_key = jax.random.split(key)
        white, xi = jax.random.normal(pixel_key, (4, 8, 8)), jax.random.normal(offset_key, (4, 1, 1))
        uniform = jax.random.uniform(jax.random.fold_in(key, 2))[None, None, None]
        has_offset = jax.random.bernoulli(jax.random.fold_in(key, 3), config.noise.probability)[None, None, None]
        return white, xi, uniform, has_offset, jax.random.normal(jax.random.fold_in(key, 4), (4, 1, 1))

    drawn = [torch.tensor(np.asarray(each)) for each in jax.vmap(draws)(keys)]
    theirs: Any = names["matched_noise"](names["PARAMETERS"], *drawn)
    np.testing.assert_allclose(theirs, start_of(pipeline, config, keys, MIDDLE), rtol=2e-5, atol=2e-5)


def test_what_is_said_before_a_training() -> None:
    flow = {"schedule__process": "flow", "data__resolution": 256, "sample__sampler": "euler", "sample__num_steps": 28,
            "sample__shift": 3.0, "noise__offset_strength": 0.1}  # fmt: skip
    config = tiny_config(**flow, **ANNEALED)
    config.optimizer.ema_decay, config.sample.params = 0.999, "ema"
    spread, average = training_advice(build(config), config.sample, config.data.resolution, 0.999)
    assert "28 steps return 67% of it" in spread and "noise.anneal=0 returns 95%" in spread
    assert "400 steps" in average and "6000 steps and more" in average


def test_what_it_cannot_apply_to() -> None:
    with pytest.raises(UserError, match=r"noise\.anneal cannot apply to plain noise"):
        validate(_config(noise__anneal=0.2))
    with pytest.raises(UserError, match=r"noise\.anneal cannot apply to noise\.kind = 'adjusted'"):
        validate(_config(noise__anneal=0.2, noise__kind="adjusted", noise__offset_strength=0.1))
    validate(_config(noise__anneal=0.2, noise__kind="adjusted", noise__offset_strength=0.1, schedule__process="flow"))
