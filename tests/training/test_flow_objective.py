"""A flow's objective: what the network is told and asked, with each kind of noise, and which timesteps it draws."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offsetjax.config import validate
from offsetjax.diffusion.noise import make_noise
from offsetjax.diffusion.process import add_noise, make_process
from tests.training.test_objective import LATENT, MANY, _config, _look


def flow(**changes: Any) -> Any:
    config = _config(schedule__process="flow", **changes)
    validate(config)
    return config


def t_of(seen: Any) -> np.ndarray:
    return np.asarray(seen.timesteps)[:, None, None, None] / 1000


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"noise__offset_strength": 0.3},
        {"noise__offset_strength": 0.3, "noise__random_strength": True, "noise__probability": 0.5},
        {"noise__kind": "pyramid", "noise__pyramid_discount": 0.5, "noise__pyramid_levels": 3},
        {"noise__kind": "spectral", "noise__spectrum": ("1 + 0.1 / (f + 0.1)",)},
    ],
)
def test_the_target_is_the_noise_less_the_latent(changes: dict[str, Any]) -> None:
    """x_t + (1-t) v is the noise, whatever its kind; here the latents are (nearly) zero, and v is the noise itself."""
    seen = _look(flow(**changes))
    assert seen.timesteps.dtype == jnp.float32 and 0 <= t_of(seen).min() < 0.05 and 0.95 < t_of(seen).max() <= 1
    np.testing.assert_allclose(seen.noisy, t_of(seen) * np.asarray(seen.target), atol=1e-5)
    # The noise is that of the same training with the present process: only t differs.
    other = _look(_config(**changes))
    np.testing.assert_allclose(seen.target, other.target, atol=1e-5)


def test_latents_are_in_the_target() -> None:
    seen = _look(flow(), log_variance=0.0)
    noise = np.asarray(seen.noisy) + (1 - t_of(seen)) * np.asarray(seen.target)
    latent = np.asarray(seen.noisy) - t_of(seen) * np.asarray(seen.target)
    plain = np.asarray(_look(flow()).target)
    np.testing.assert_allclose(noise, plain, atol=1e-4)
    assert latent.std() == pytest.approx(1.0, rel=0.1)


def test_noise_that_changes_with_time_has_its_derivative_in_the_target() -> None:
    seen = _look(flow(noise__kind="adjusted", noise__offset_strength=0.5, sample__sampler="euler"))
    shift = np.asarray(seen.target).mean((2, 3), keepdims=True)
    pixels = np.asarray(_look(flow()).target)  # the same pixels without a shift
    in_target, in_input = np.asarray(seen.target) - pixels, np.asarray(seen.noisy) / t_of(seen) - pixels
    assert np.abs(in_target - in_target[..., :1, :1]).max() < 1e-4 and np.abs(shift).max() > 0.5
    # n = ε + t c ξ, dn/dt = c ξ: the target has (ψ + t ψ') c ξ = 2 t c ξ.
    late = t_of(seen)[:, 0, 0, 0] > 0.1
    np.testing.assert_allclose(in_target[late], 2 * in_input[late], atol=1e-3)


def test_input_perturbation_is_in_the_input_alone() -> None:
    plain, perturbed = _look(flow()), _look(flow(noise__input_perturbation=0.3))
    np.testing.assert_allclose(perturbed.target, plain.target, atol=1e-6)
    extra = (np.asarray(perturbed.noisy) - np.asarray(plain.noisy)) / t_of(plain)
    assert extra.std() == pytest.approx(0.3, rel=0.05)


@pytest.mark.parametrize("process", ["flow", "variance_preserving"])
def test_timesteps_follow_the_density_and_the_range(process: str) -> None:
    changes = {"schedule__process": process, "timesteps__density": "logit_normal", "timesteps__mean": 0.5}
    told = np.asarray(_look(_config(**changes), MANY, (1, 1, 1)).timesteps, np.float64)
    assert np.median(told) == pytest.approx(1000 / (1 + np.exp(-0.5)), abs=6)
    ranged = _config(**changes, loss__min_timestep=200, loss__max_timestep=600)
    validate(ranged)
    told = np.asarray(_look(ranged, MANY, (1, 1, 1)).timesteps)
    assert told.min() >= 200 and told.max() <= 600 and told.max() > 580


def test_a_shift_moves_the_density_of_a_flow() -> None:
    told = np.asarray(_look(flow(schedule__shift=3.0), MANY, (1, 1, 1)).timesteps, np.float64)
    assert np.median(told) == pytest.approx(750, abs=6)  # 3 u / (1 + 2 u) at 1/2


@pytest.mark.parametrize("process", ["flow", "variance_preserving"])
def test_a_stratified_batch_covers_the_density_evenly(process: str) -> None:
    config = _config(schedule__process=process, timesteps__stratified=True, train__global_batch_size=256)
    told = np.asarray(_look(config).timesteps, np.float64)
    assert np.abs(told / 1000 - (np.arange(256) + 0.5) / 256).max() < 0.5 / 256 + 0.001


@pytest.mark.parametrize(("weighting", "at_half"), [("sigma_sqrt", 4.0), ("cosmap", 4 / np.pi)])
def test_loss_weights_multiply_each_examples_loss(weighting: str, at_half: float) -> None:
    plain, weighted = _look(flow()), _look(flow(loss__weighting=weighting))
    t = t_of(plain).ravel()
    expected = 1 / t**2 if weighting == "sigma_sqrt" else 2 / (np.pi * (1 - 2 * t + 2 * t**2))
    late = t > 0.01
    np.testing.assert_allclose((weighted.losses / plain.losses)[late], expected[late], rtol=1e-4)
    assert expected[np.abs(t - 0.5).argmin()] == pytest.approx(at_half, rel=0.05)


def test_min_snr_weighs_errors_of_x0() -> None:
    plain, weighted = _look(flow()), _look(flow(loss__min_snr_gamma=5.0))
    t = t_of(plain).ravel()
    expected = np.minimum(((1 - t) / t) ** 2, 5.0) * t**2
    np.testing.assert_allclose(weighted.losses / plain.losses, expected, rtol=1e-3, atol=1e-6)


def test_the_start_of_sampling_is_the_noise_at_t_1() -> None:
    config = flow(noise__kind="adjusted", noise__offset_strength=0.5, sample__sampler="euler")
    noise, key = make_noise(config.noise, make_process(config.schedule), 8), jax.random.key(0)
    np.testing.assert_array_equal(noise.start(key, LATENT), noise.draw(key, jnp.zeros(LATENT), jnp.float32(1.0)))


def test_each_channel_has_its_own_strength_and_min_snr_knows_them() -> None:
    strengths = (0.2, 0.4, 0.8, 1.6)
    changes: dict[str, Any] = {"noise__channel_strengths": strengths}
    plain, seen = _look(flow(), 4096), _look(flow(**changes), 4096)
    shift = np.asarray(seen.target - plain.target)
    assert np.abs(shift - shift[..., :1, :1]).max() < 1e-5
    np.testing.assert_allclose(shift[..., 0, 0].std(0), strengths, rtol=0.05)
    np.testing.assert_allclose(seen.noisy - plain.noisy, t_of(plain) * shift, atol=1e-5)
    weighted = _look(flow(**changes, loss__min_snr_gamma=5.0), 4096)
    t, variance = t_of(seen).ravel(), 1 + np.mean(np.square(strengths))  # of a pixel, over the channels
    expected = np.minimum(((1 - t) / t) ** 2 / variance, 5.0) * t**2
    np.testing.assert_allclose(weighted.losses / seen.losses, expected, rtol=1e-3, atol=1e-6)


def test_an_adaptive_strength_goes_by_each_latents_own_mean() -> None:
    """`max(c + a |mean x0|, 0)`, a channel; the noise is `x_t + (1-t) v` and the latent `x_t - t v`."""
    known: dict[str, Any] = {"noise__data_mean": (0.0,) * 4, "noise__data_mean_std": (0.25,) * 4}
    adaptive = {"noise__offset_strength": 0.3, "noise__adaptive_scale": -2.0, **known}
    plain, whole, seen = (
        _look(flow(**changes), log_variance=0.0) for changes in ({}, {"noise__offset_strength": 1.0}, adaptive)
    )
    t = t_of(plain)

    def noise(seen: Any) -> np.ndarray:
        return np.asarray(seen.noisy) + (1 - t) * np.asarray(seen.target)

    latent = np.asarray(plain.noisy) - t * np.asarray(plain.target)
    xi = (noise(whole) - noise(plain)).mean((2, 3))
    strength = (noise(seen) - noise(plain)).mean((2, 3)) / xi
    expected = np.maximum(0.3 - 2.0 * np.abs(latent.mean((2, 3))), 0.0)
    certain = np.abs(xi) > 0.1
    np.testing.assert_allclose(strength[certain], expected[certain], atol=2e-4)
    assert (expected == 0).any() and expected.max() > 0.25


@pytest.mark.parametrize("timestep", [0.05, 0.4, 0.8, 1.0])
def test_the_target_is_the_derivative_of_the_path_of_noise_that_changes(timestep: float) -> None:
    """Against finite differences of x_t itself, for one latent and one key: `dx_t/dt`, with the noise's own change."""
    config = flow(noise__kind="adjusted", noise__offset_strength=0.7, sample__sampler="euler")
    process, key = make_process(config.schedule), jax.random.key(3)
    noise, latent = make_noise(config.noise, process, 8), jax.random.normal(jax.random.key(4), LATENT)

    def at(t: float) -> np.ndarray:
        return np.asarray(add_noise(process, latent, noise.draw(key, latent, jnp.float32(t)), jnp.float32(t)))

    step = 1e-2  # x_t is of second order in t: central differences of it are exact
    slope = (at(timestep + step) - at(timestep - step)) / (2 * step)
    t = jnp.float32(timestep)
    target = process.target(latent, noise.draw(key, latent, t), noise.rate(key, latent, t), t)
    np.testing.assert_allclose(target, slope, atol=2e-4)
    assert np.abs(np.asarray(noise.rate(key, latent, t))).max() > 0.1
