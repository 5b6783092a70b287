"""The learning rate over the updates: a warm-up, then a decay, which an extended training may begin anew."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from ml_collections import ConfigDict


def learning_rate(settings: ConfigDict, num_steps: int) -> optax.Schedule:
    """The rate of each update by the section `optimizer`.

    Args:
        num_steps: of the training, or of its stage, at whose end the decay ends.
    """
    begin = settings.decay_from
    if not 0 < begin < num_steps:
        return _rate(settings, num_steps)
    return optax.join_schedules([_rate(settings, begin), _rate(settings, num_steps - begin)], [begin])


def _rate(settings: ConfigDict, num_steps: int) -> optax.Schedule:
    """A linear warm-up to the highest rate, then the decay to its end at `num_steps`."""
    warmup = min(settings.warmup_steps, num_steps)
    after = _decay(settings, max(1, num_steps - warmup), max(1, warmup))
    if warmup == 0:
        return after
    # From 1/warmup rather than 0, so that the first step is not wasted.
    ramp = optax.linear_schedule(settings.learning_rate / warmup, settings.learning_rate, warmup)
    return optax.join_schedules([ramp, after], [warmup])


def _decay(settings: ConfigDict, steps: int, warmup: int) -> optax.Schedule:
    """What follows the warm-up, over so many steps."""
    highest, share = settings.learning_rate, settings.decay_end
    match settings.decay:
        case "constant":
            return optax.constant_schedule(highest)
        case "linear":
            return optax.linear_schedule(highest, share * highest, steps)
        case "polynomial":
            return optax.polynomial_schedule(highest, share * highest, settings.decay_power, steps)
        case "cosine":
            return optax.cosine_decay_schedule(highest, steps, share)
        case "cosine_restarts":
            length, left = divmod(steps, settings.decay_cycles)
            lengths = [length + (cycle < left) for cycle in range(settings.decay_cycles)]
            ends = [sum(lengths[:cycle]) for cycle in range(1, len(lengths))]
            return optax.join_schedules([optax.cosine_decay_schedule(highest, max(1, n), share) for n in lengths], ends)
        case "warmup_stable_decay":
            falling = max(1, round(settings.decay_fraction * steps))
            fall = optax.linear_schedule(highest, share * highest, falling)
            return optax.join_schedules([optax.constant_schedule(highest), fall], [steps - falling])
        case "inverse_sqrt":
            return lambda count: _inverse_sqrt(highest, warmup, jnp.asarray(count, jnp.float32))
    raise ValueError(f"optimizer.decay = {settings.decay!r}")


def _inverse_sqrt(highest: float, warmup: int, count: Float[Array, ""]) -> Float[Array, ""]:
    """A. Vaswani et al., arXiv 1706.03762, section 5.3: as 1/√step, beginning at the highest."""
    return highest * jnp.sqrt(warmup / (warmup + count))
