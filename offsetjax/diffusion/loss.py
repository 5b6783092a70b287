r"""One loss value an example.

    L = w_t · mean (prediction - target)²

Min-SNR weighting (T. Hang et al., arXiv 2303.09556): `w_t = min(SNR_t, γ) / SNR_t` for ε; for v the weight is divided
by `SNR_t + 1`, since an error of v is an error of x0 times `√(SNR_t + 1)`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from offsetjax.diffusion.schedule import Schedule, snr


def min_snr_weight(schedule: Schedule, timestep: Int[Array, ""], gamma: float) -> Float[Array, ""]:
    """The weight of one example's loss; `gamma` 0 turns weighting off (1 everywhere), 5 is the paper's value."""
    if gamma == 0:
        return jnp.ones(())
    ratio = snr(schedule, timestep)
    return jnp.minimum(ratio, gamma) / (ratio + (schedule.prediction_type == "v_prediction"))


def mean_squared_error(prediction: Float[Array, "*s"], target: Float[Array, "*s"]) -> Float[Array, ""]:
    """The mean over one example, in float32."""
    return jnp.mean(jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32)))


def kl_to_standard_normal(mean: Float[Array, "*s"], log_variance: Float[Array, "*s"]) -> Float[Array, ""]:
    """`KL(N(mean, variance) ‖ N(0, I))` of one example, a mean over its elements, in nats."""
    return 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance)
