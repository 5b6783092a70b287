"""The process is PyTorch diffusers' one, and predictions convert to x0 and n without loss."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from offsetjax.diffusion.process import add_noise
from offsetjax.diffusion.variance_preserving import VariancePreserving, variance_preserving

STABLE_DIFFUSION = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012}
TIMESTEPS = (0, 1, 250, 500, 750, 998, 999)


def stable_diffusion(prediction_type: str) -> VariancePreserving:
    return variance_preserving(**STABLE_DIFFUSION, prediction_type=prediction_type)


@pytest.fixture(scope="module")
def latent_and_noise() -> tuple[jax.Array, jax.Array]:
    generator = np.random.default_rng(0)
    latent, noise = generator.standard_normal((2, 4, 8, 8)).astype(np.float32)
    return jnp.asarray(latent), jnp.asarray(noise)


@pytest.mark.parametrize("scheduler", [diffusers.DDPMScheduler, diffusers.DDIMScheduler])
@pytest.mark.parametrize("num_train_timesteps", [1000, 100])
def test_alphas_cumprod_are_those_of_diffusers(scheduler: type, num_train_timesteps: int) -> None:
    theirs = scheduler(num_train_timesteps, 0.00085, 0.012, "scaled_linear").alphas_cumprod
    ours = variance_preserving(num_train_timesteps, 0.00085, 0.012, "epsilon").alphas_cumprod
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_the_last_step_of_stable_diffusion_still_shows_the_signal() -> None:
    process = stable_diffusion("epsilon")
    assert float(process.scales(999)[0]) == pytest.approx(0.0683, abs=5e-5)
    assert float(process.snr(999)) == pytest.approx(0.00468, abs=5e-6)


@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_noisy_latents_and_targets_are_those_of_diffusers(timestep: int, latent_and_noise: tuple) -> None:
    theirs = diffusers.DDPMScheduler(**STABLE_DIFFUSION, beta_schedule="scaled_linear")
    arguments = [torch.tensor(np.asarray(x))[None] for x in latent_and_noise] + [torch.tensor([timestep])]
    at = jnp.int32(timestep)
    noisy = add_noise(stable_diffusion("epsilon"), *latent_and_noise, at)
    np.testing.assert_allclose(noisy, theirs.add_noise(*arguments)[0], atol=2e-6)
    velocity = stable_diffusion("v_prediction").target(*latent_and_noise, 0.0, at)
    np.testing.assert_allclose(velocity, theirs.get_velocity(*arguments)[0], atol=2e-6)
    epsilon = stable_diffusion("epsilon").target(*latent_and_noise, 0.0, at)
    np.testing.assert_array_equal(epsilon, latent_and_noise[1])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_perfect_prediction_gives_back_the_latent_and_the_noise(prediction_type: str) -> None:
    process = stable_diffusion(prediction_type)

    def example(key: jax.Array) -> tuple[jax.Array, ...]:
        time_key, latent_key, noise_key, scale_key = jax.random.split(key, 4)
        timestep = jax.random.randint(time_key, (), 0, 1000)
        scale = jnp.exp(2 * jax.random.normal(scale_key))
        latent, noise = scale * jax.random.normal(latent_key, (4, 3, 5)), jax.random.normal(noise_key, (4, 3, 5))
        noisy = add_noise(process, latent, noise, timestep)
        found = process.to_latent_and_noise(noisy, process.target(latent, noise, 0.0, timestep), timestep)
        # An error of rounding of x_t is divided by √ᾱ_t where ε is predicted.
        gain = 1 / process.scales(timestep)[0] if prediction_type == "epsilon" else 1.0
        bound = 1e-6 * (1 + jnp.abs(latent).max() + jnp.abs(noise).max()) * gain
        return jnp.abs(found[0] - latent).max() / bound, jnp.abs(found[1] - noise).max() / bound

    errors = jax.jit(jax.vmap(example))(jax.random.split(jax.random.key(4), 500))
    assert max(float(error.max()) for error in errors) < 1


@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_both_parameterisations_stand_for_the_same_estimates(timestep: int, latent_and_noise: tuple) -> None:
    at = jnp.int32(timestep)
    noisy, velocity = latent_and_noise  # any two arrays: a wrong prediction, too, has one meaning
    latent, noise = stable_diffusion("v_prediction").to_latent_and_noise(noisy, velocity, at)
    again = stable_diffusion("epsilon").to_latent_and_noise(noisy, noise, at)
    np.testing.assert_allclose(again[0], latent, atol=2e-5)
    np.testing.assert_allclose(add_noise(stable_diffusion("epsilon"), latent, noise, at), noisy, atol=2e-6)
