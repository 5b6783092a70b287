r"""The forward process and its parameterisations.

    x_t = √ᾱ_t x0 + √(1-ᾱ_t) n            ᾱ_t = Π_{i≤t} (1-β_i)      SNR_t = ᾱ_t / (1-ᾱ_t)
    v_t = √ᾱ_t n - √(1-ᾱ_t) x0

β is "scaled linear", linear in √β, as in Stable Diffusion. With a zero terminal SNR nothing of the picture is left at
the last step. Sources: J. Ho et al., arXiv 2006.11239; R. Rombach et al., arXiv 2112.10752; T. Salimans and J. Ho,
arXiv 2202.00512 (v); S. Lin et al., arXiv 2305.08891 (zero terminal SNR).
"""

from typing import Literal

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

PredictionType = Literal["epsilon", "v_prediction"]


@flax.struct.dataclass
class Schedule:
    """The discrete schedule: `alphas_cumprod` is ᾱ, the signal's variance kept at each of `T` steps."""

    alphas_cumprod: Float[np.ndarray, " T"]
    prediction_type: PredictionType = flax.struct.field(pytree_node=False)

    @property
    def num_train_timesteps(self) -> int:
        return self.alphas_cumprod.shape[0]


def make_schedule(
    num_train_timesteps: int,
    beta_start: float,
    beta_end: float,
    prediction_type: PredictionType,
    zero_terminal_snr: bool = False,
) -> Schedule:
    """Scaled-linear β from `beta_start` to `beta_end`, computed in float64 and rounded once.

    Args:
        zero_terminal_snr: shift and scale `√ᾱ` such that its last value is 0 and its first one stays.
    """
    betas = np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=np.float64) ** 2
    signal = np.sqrt(np.cumprod(1.0 - betas))
    if zero_terminal_snr:
        signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    return Schedule((signal**2).astype(np.float32), prediction_type)


def signal_and_noise_scale(schedule: Schedule, timestep: Int[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`√ᾱ_t` and `√(1-ᾱ_t)`."""
    alpha_cumprod = jnp.asarray(schedule.alphas_cumprod)[timestep]
    return jnp.sqrt(alpha_cumprod), jnp.sqrt(1.0 - alpha_cumprod)


def snr(schedule: Schedule, timestep: Int[Array, ""]) -> Float[Array, ""]:
    """The signal-to-noise ratio of a pixel, `ᾱ_t / (1-ᾱ_t)`."""
    alpha_cumprod = jnp.asarray(schedule.alphas_cumprod)[timestep]
    return alpha_cumprod / (1.0 - alpha_cumprod)


def add_noise(
    schedule: Schedule, latent: Float[Array, "*s"], noise: Float[Array, "*s"], timestep: Int[Array, ""]
) -> Float[Array, "*s"]:
    """`x_t` of one example."""
    signal, sigma = signal_and_noise_scale(schedule, timestep)
    return signal * latent + sigma * noise


def target(
    schedule: Schedule, latent: Float[Array, "*s"], noise: Float[Array, "*s"], timestep: Int[Array, ""]
) -> Float[Array, "*s"]:
    """What the network must predict for one example: the noise itself, or the velocity."""
    if schedule.prediction_type == "epsilon":
        return noise
    signal, sigma = signal_and_noise_scale(schedule, timestep)
    return signal * noise - sigma * latent


def to_latent_and_noise(
    schedule: Schedule, noisy: Float[Array, "*s"], prediction: Float[Array, "*s"], timestep: Int[Array, ""]
) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
    """The estimates of `x0` and of `n` that a prediction at `x_t` stands for."""
    signal, sigma = signal_and_noise_scale(schedule, timestep)
    if schedule.prediction_type == "epsilon":
        return (noisy - sigma * prediction) / signal, prediction
    return signal * noisy - sigma * prediction, signal * prediction + sigma * noisy
