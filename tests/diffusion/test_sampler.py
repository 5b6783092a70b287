"""DDIM step for step as in PyTorch diffusers; and what its start noise does to brightness."""

from collections.abc import Callable

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from offsetjax.config import default_config, validate
from offsetjax.diffusion.noise import batch_noise
from offsetjax.diffusion.sampler import coefficients, solve, timestep_grid
from offsetjax.diffusion.schedule import Schedule, make_schedule, signal_and_noise_scale
from offsetjax.errors import UserError

SPACINGS = ("trailing", "leading")
PREDICTION_TYPES = ("epsilon", "v_prediction")


def torch_scheduler(prediction_type: str, spacing: str) -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(
        1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
        prediction_type=prediction_type, timestep_spacing=spacing,
    )  # fmt: skip


@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_time_steps_are_those_of_diffusers_and_lie_in_the_schedule(spacing: str) -> None:
    scheduler = torch_scheduler("epsilon", spacing)
    for num_steps in (*range(1, 60), 99, 250, 333, 500, 999):
        scheduler.set_timesteps(num_steps)
        grid = timestep_grid(1000, num_steps, spacing)
        np.testing.assert_array_equal(grid, scheduler.timesteps)
        assert len(grid) == num_steps and grid.min() >= 0 and grid.max() < 1000


@pytest.mark.parametrize(("spacing", "num_steps"), [("trailing", 1001), ("leading", 1000), ("leading", 1001)])
def test_more_steps_than_the_schedule_has_are_refused(spacing: str, num_steps: int) -> None:
    config = default_config()
    config.sample.spacing, config.sample.num_steps = spacing, num_steps
    with pytest.raises(UserError, match=r"sample\.num_steps = \d+ must be at most"):
        validate(config)
    config.sample.num_steps = {"trailing": 1000, "leading": 999}[spacing]
    validate(config)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [7, 10, 25, 50])
def test_the_path_is_that_of_diffusers(prediction_type: str, spacing: str, num_steps: int) -> None:
    generator = np.random.default_rng(num_steps)
    start = generator.standard_normal((2, 4, 6, 6)).astype(np.float32)
    mix = (0.4 * generator.standard_normal((4, 4))).astype(np.float32)
    drift = generator.standard_normal((4, 1, 1)).astype(np.float32)

    scheduler = torch_scheduler(prediction_type, spacing)
    scheduler.set_timesteps(num_steps)
    theirs = torch.from_numpy(start)
    for timestep in scheduler.timesteps:
        prediction = (
            torch.einsum("oc,bchw->bohw", torch.from_numpy(mix), theirs) + torch.from_numpy(drift) * timestep / 1000
        )
        theirs = scheduler.step(prediction, timestep, theirs).prev_sample

    def denoiser(noisy: jax.Array, timestep: jax.Array) -> jax.Array:
        return jnp.einsum("oc,bchw->bohw", mix, noisy) + drift * timestep / 1000

    schedule = make_schedule(1000, 0.00085, 0.012, prediction_type)
    ours = solve(denoiser, schedule, coefficients("ddim", schedule, num_steps, spacing), start)
    assert np.abs(ours - theirs.numpy()).max() <= 1e-5 * np.abs(theirs.numpy()).max()


def optimal_denoiser(schedule: Schedule, data: tuple[float, float], noise: tuple[float, float]) -> Callable:
    """The conditional expectation of the target for normal data; variances are (of the DC mode, of each other one)."""

    def denoiser(noisy: jax.Array, timestep: jax.Array) -> jax.Array:
        signal, sigma = signal_and_noise_scale(schedule, timestep)
        mean = noisy.mean((2, 3), keepdims=True)

        def predict(part: jax.Array, data: float, noise: float) -> jax.Array:
            per_unit = part / (signal**2 * data + sigma**2 * noise)
            latent, noise = signal * data * per_unit, sigma * noise * per_unit
            return noise if schedule.prediction_type == "epsilon" else signal * noise - sigma * latent

        return predict(mean, data[0], noise[0]) + predict(noisy - mean, data[1], noise[1])

    return denoiser


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_only_the_matched_start_gives_brightness_its_spread(prediction_type: str) -> None:
    """Solved exactly, DDIM takes a start of variance V to V · data / (ᾱ_T data + (1-ᾱ_T) noise), a mode."""
    strength, side, brightness_std = 0.1, 64, 0.33
    pixels = side**2
    data, noise = (pixels * brightness_std**2, 0.5), (1 + strength**2 * pixels, 1.0)
    schedule = make_schedule(1000, 0.00085, 0.012, prediction_type)
    denoiser = optimal_denoiser(schedule, data, noise)
    keys = jax.random.split(jax.random.key(0), 256)
    table = coefficients("ddim", schedule, 200, "trailing")
    path = jax.jit(lambda start: solve(denoiser, schedule, table, start))

    kept = float(schedule.alphas_cumprod[-1])
    gain = (data[0] / (kept * data[0] + (1 - kept) * noise[0])) ** 0.5
    for start_strength, measured_elsewhere in ((strength, 0.32), (0.0, 0.050)):
        start = batch_noise(keys, (1, side, side), start_strength)
        latents = np.asarray(path(start))
        np.testing.assert_allclose(latents.mean((1, 2, 3)), gain * start.mean((1, 2, 3)), rtol=0.01, atol=1e-5)
        predicted = gain * ((1 + start_strength**2 * pixels) / pixels) ** 0.5
        assert predicted == pytest.approx(measured_elsewhere, rel=0.02)
        standard_error = predicted / np.sqrt(2 * len(keys))
        assert abs(latents.mean((1, 2, 3)).std() - predicted) < 4 * standard_error
        # All other modes have their variance in either case.
        residual = latents - latents.mean((2, 3), keepdims=True)
        assert residual.var() == pytest.approx(data[1], rel=0.02)
    assert gain * (noise[0] / pixels) ** 0.5 == pytest.approx(brightness_std, rel=0.03)
