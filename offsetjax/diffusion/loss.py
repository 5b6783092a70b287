r"""One loss value an example.

    L = w_t · mean (prediction - target)²

Min-SNR weighting (T. Hang et al., arXiv 2303.09556) gives an error of x0 the weight `min(SNR_t, γ)`. An error of ε is
one of x0 divided by √SNR_t, an error of v one divided by √(SNR_t + 1), an error of a flow's velocity one divided by t,
all of plain noise: so

    w_t = min(SNR_t / s², γ) / SNR_t  for ε,    min(SNR_t / s², γ) / (SNR_t + 1)  for v,    min(SNR_t / s², γ) t²

where s² is the variance of a pixel's noise: 1 for plain noise, 1 + c² with an offset of strength c. The third vanishes
as `(1-t)²` at the noisy end of a flow, where brightness is decided. A flow's other weights are functions of σ = t alone
(P. Esser et al., arXiv 2403.03206, as PyTorch's training scripts have them):

    sigma_sqrt    1 / σ²                  cosmap    2 / (π (1 - 2σ + 2σ²))
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from offsetjax.diffusion.process import Process, Timestep


def min_snr_weight(
    process: Process, timestep: Timestep, gamma: float, noise_variance: float | Float[Array, ""] = 1.0
) -> Float[Array, ""]:
    """The weight of one example's loss; `gamma` 0 leaves the process's own, 5 is the paper's value.

    Args:
        noise_variance: `s²`, at this timestep.
    """
    if gamma == 0:
        return jnp.ones(()) * process.weight(timestep)
    return jnp.minimum(process.snr(timestep) / noise_variance, gamma) / process.error_gain(timestep)


def flow_weight(process: Process, timestep: Timestep, weighting: str) -> Float[Array, ""]:
    """The weight of one example's loss by `loss.weighting`: "none" (1 everywhere), "sigma_sqrt" or "cosmap"."""
    alpha, sigma = process.scales(timestep)
    sigma = sigma / (alpha + sigma)  # t, on whichever scale
    match weighting:
        case "sigma_sqrt":
            return 1.0 / jnp.maximum(sigma, 1e-3) ** 2  # the least σ that those scripts know
        case "cosmap":
            return 2.0 / (jnp.pi * (1.0 - 2.0 * sigma + 2.0 * sigma**2))
    return jnp.ones(())


def mean_squared_error(prediction: Float[Array, "*s"], target: Float[Array, "*s"]) -> Float[Array, ""]:
    """The mean over one example, in float32."""
    return jnp.mean(jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32)))


def kl_to_standard_normal(mean: Float[Array, "*s"], log_variance: Float[Array, "*s"]) -> Float[Array, ""]:
    """`KL(N(mean, variance) ‖ N(0, I))` of one example, a mean over its elements, in nats."""
    return 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance)
