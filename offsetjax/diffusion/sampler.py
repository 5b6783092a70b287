r"""DDIM without added noise (η = 0), from T to 0.

    x_s = √ᾱ_s x̂0 + √(1-ᾱ_s) n̂,    s < t the next time step of the grid

It is exact for any noise distribution as long as `x_T` is drawn from the one of training: offset noise at training
wants offset noise at the start. Source: J. Song et al., arXiv 2010.02502; spacings: S. Lin et al., arXiv 2305.08891.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from offsetjax.diffusion.schedule import Schedule, to_latent_and_noise

Spacing = Literal["trailing", "leading"]
Denoiser = Callable[[Float[Array, "b c h w"], Int[Array, ""]], Float[Array, "b c h w"]]


def timestep_grid(num_train_timesteps: int, num_steps: int, spacing: Spacing) -> Int[np.ndarray, " n"]:
    """The time steps visited, from noisy to clean.

    Args:
        spacing: "trailing" begins at the last time step, T - 1; "leading" is Stable Diffusion's default, with the
            offset of one step that its scheduler has (`steps_offset=1`), and never visits the noisiest steps.
    """
    if spacing == "trailing":
        return np.round(np.arange(num_train_timesteps, 0, -num_train_timesteps / num_steps)).astype(np.int32) - 1
    stride = num_train_timesteps // num_steps
    return (np.arange(num_steps)[::-1] * stride + 1).astype(np.int32)


def ddim(
    denoiser: Denoiser, schedule: Schedule, start: Float[Array, "b c h w"], num_steps: int, spacing: Spacing
) -> Float[Array, "b c h w"]:
    """Solves from the noise `start` to latents, as one `lax.scan`.

    Args:
        denoiser: `(x_t, t) -> prediction` of the schedule's type, guidance included.
        start: `x_T`, drawn from the noise of training.
    """
    timesteps = timestep_grid(schedule.num_train_timesteps, num_steps, spacing)
    previous = timesteps - schedule.num_train_timesteps // num_steps
    alphas_cumprod = jnp.asarray(schedule.alphas_cumprod)

    def step(noisy, times):
        timestep, previous_timestep = times
        prediction = denoiser(noisy, timestep).astype(jnp.float32)
        latent, noise = to_latent_and_noise(schedule, noisy, prediction, timestep)
        # Past the last step the signal kept is that of t = 0 (diffusers: set_alpha_to_one=False).
        alpha_cumprod = alphas_cumprod[jnp.maximum(previous_timestep, 0)]
        return jnp.sqrt(alpha_cumprod) * latent + jnp.sqrt(1.0 - alpha_cumprod) * noise, None

    return jax.lax.scan(step, start, (jnp.asarray(timesteps), jnp.asarray(previous)))[0]
