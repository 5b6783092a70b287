"""Steps whose loss or gradient jumps: skipped by choice (`train.max_spike`), as those are that are not finite.

    r = max_i x_i / exp(m_i),   m_i ← m_i + a (log x_i - m_i),   a = max(1 / (n + 1), 1 / 50)

over x = (loss, gradient norm), where n counts the steps that were taken: m is the running mean of the logarithm, which
one value, however large, moves little, and a spike that is skipped not at all.
"""

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_WINDOW = 50
_FIRST = 20  # steps, before which there is no mean to compare with


@flax.struct.dataclass
class Spikes:
    """The running means; they are part of the train state, so that a resumed run skips the same steps."""

    count: Int[Array, ""]
    means: Float[Array, " 2"]


def no_spikes() -> Spikes:
    """Those before the first step."""
    return Spikes(jnp.zeros((), jnp.int32), jnp.zeros(2))


def spike_ratio(spikes: Spikes, loss: Float[Array, ""], grad_norm: Float[Array, ""]) -> Float[Array, ""]:
    """How many times its running mean the loss or the gradient's norm is, the larger of the two; 0 at the beginning."""
    ratio = jnp.exp(_logarithms(loss, grad_norm) - spikes.means).max()
    return jnp.where(spikes.count < _FIRST, 0.0, ratio)


def followed(spikes: Spikes, loss: Float[Array, ""], grad_norm: Float[Array, ""], is_taken: Bool[Array, ""]) -> Spikes:
    """The running means after a step, which one that is not taken leaves as they were."""
    rate = jnp.maximum(1.0 / (spikes.count + 1.0), 1.0 / _WINDOW)
    means = spikes.means + rate * (_logarithms(loss, grad_norm) - spikes.means)
    return Spikes(spikes.count + is_taken, jnp.where(is_taken, means, spikes.means))


def _logarithms(loss: Float[Array, ""], grad_norm: Float[Array, ""]) -> Float[Array, " 2"]:
    return jnp.log(jnp.maximum(jnp.stack([loss, grad_norm]).astype(jnp.float32), 1e-30))
