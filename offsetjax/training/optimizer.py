"""AdamW with warm-up, decay and clipping, from optax."""

from collections.abc import Mapping
from functools import partial

import jax
import optax
from jaxtyping import PyTree
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
    """Global-norm clipping, then AdamW, for parameters by part; the optimizer sees those that are trained alone.

    The text encoders' learning rate is `optimizer.text_encoder_learning_rate`, with the same warm-up and decay.
    """
    optimizer = config.optimizer
    steps = optax.chain(
        optax.clip_by_global_norm(optimizer.max_grad_norm),
        optax.adamw(
            learning_rate(config),
            b1=optimizer.b1,
            b2=optimizer.b2,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            mask=partial(_is_read, num_layers=config.model.text_encoder.num_hidden_layers),
        ),
    )
    if not optimizer.text_encoder_learning_rate:
        return steps
    # AdamW's step, its decay included, is proportional to the learning rate.
    ratio = optimizer.text_encoder_learning_rate / optimizer.learning_rate
    scales = {"unet": optax.identity(), "text_encoder": optax.scale(ratio)}
    return optax.chain(steps, optax.partition(scales, _labels))


def _labels(params: Mapping[str, PyTree]) -> dict[str, str]:
    return {part: "unet" if part == "unet" else "text_encoder" for part in params}


def _is_read(params: Mapping[str, PyTree], num_layers: int) -> PyTree:
    """Which parameters the loss depends on; the others have no gradient, and no decay either.

    SDXL reads its first text encoder, of `num_layers`, before the last of them.
    """
    last = f"text_encoder/text_model/encoder/layers/{num_layers - 1}/"
    unread = (last, "text_encoder/text_model/final_layer_norm/") if "text_encoder_2" in params else ()
    name = partial(jax.tree_util.keystr, simple=True, separator="/")
    return jax.tree_util.tree_map_with_path(lambda path, _: not name(path).startswith(unread), params)
