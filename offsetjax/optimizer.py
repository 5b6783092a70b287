"""AdamW with warm-up, decay and clipping, from optax."""

import optax
from ml_collections import ConfigDict


def learning_rate(config: ConfigDict) -> optax.Schedule:
    """Linear warm-up to `optimizer.learning_rate`, then the decay to 0 at `train.steps`."""
    optimizer, steps = config.optimizer, config.train.steps
    warmup = min(optimizer.warmup_steps, steps)
    remaining = max(1, steps - warmup)
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(optimizer.learning_rate, remaining),
        "linear": lambda: optax.linear_schedule(optimizer.learning_rate, 0.0, remaining),
        "constant": lambda: optax.constant_schedule(optimizer.learning_rate),
    }[optimizer.decay]()
    if warmup == 0:
        return after
    # From 1/warmup rather than 0, so that the first step is not wasted.
    ramp = optax.linear_schedule(optimizer.learning_rate / warmup, optimizer.learning_rate, warmup)
    return optax.join_schedules([ramp, after], [warmup])


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW; the optimizer sees trained parameters only."""
    optimizer = config.optimizer
    return optax.chain(
        optax.clip_by_global_norm(optimizer.max_grad_norm),
        optax.adamw(
            learning_rate(config),
            b1=optimizer.b1,
            b2=optimizer.b2,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        ),
    )
