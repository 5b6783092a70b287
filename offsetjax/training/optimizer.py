"""The optimizer: global-norm clipping, then what `optimizer.name` names, with a learning rate for each part.

Another optimizer is a function of the section `optimizer`, the number of steps and what may decay, which
`OPTIMIZERS.register(name, function)` makes known; it need know nothing of parts.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree
from ml_collections import ConfigDict

from offsetjax.config.registries import OPTIMIZERS
from offsetjax.training.schedules import learning_rate

# Parameters → a tree of the same structure of whether each may decay.
Mask = Callable[[PyTree], PyTree]


class Optimizer(NamedTuple):
    """How gradients become updates, and the learning rate at each step that is applied, for the log."""

    transform: optax.GradientTransformation
    learning_rate: optax.Schedule


class BuildOptimizer(Protocol):
    """Builds an optimizer of one learning rate.

    Args:
        settings: the section `optimizer` of a config; `learning_rate` is that of the part.
        num_steps: of the training, or of its stage.
        decays: which parameters a weight decay may change.
    """

    def __call__(self, settings: ConfigDict, num_steps: int, decays: Mask) -> Optimizer: ...


def adamw(settings: ConfigDict, num_steps: int, decays: Mask) -> Optimizer:
    """AdamW (I. Loshchilov and F. Hutter, arXiv 1711.05101)."""
    rate = learning_rate(settings, num_steps)
    transform = optax.adamw(
        rate,
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        mu_dtype=settings.moment_dtype,
        weight_decay=settings.weight_decay,
        mask=decays,
    )
    return Optimizer(transform, rate)


def make_optimizer(
    settings: ConfigDict, num_steps: int, encoders: Collection[str] = (), unread: tuple[str, ...] = (), first: int = 0
) -> Optimizer:
    """The optimizer of the section `optimizer` of a config, for parameters by part; it sees those that are trained.

    The text encoders have `optimizer.text_encoder_learning_rate`, if it is set, with the same warm-up and decay; the
    gradient's norm is that of all parts together.

    Args:
        num_steps: over which the learning rate rises and falls: of the training, or of its stage.
        encoders: the parts that are text encoders.
        unread: what the paths begin with of parameters that no loss depends on, which get no weight decay.
        first: updates before these steps, those of the stages before.

    Raises:
        UserError: an unknown `optimizer.name`.
    """
    build: BuildOptimizer = OPTIMIZERS[settings.name]
    decays = partial(_is_read, unread=unread)
    of_denoiser = build(settings, num_steps, decays)
    transform = of_denoiser.transform
    if settings.text_encoder_learning_rate:
        of_text = settings.copy_and_resolve_references()
        of_text.learning_rate = settings.text_encoder_learning_rate
        second = build(of_text, num_steps, decays)
        transform = optax.partition(
            {"denoiser": of_denoiser.transform, "encoders": second.transform},
            lambda params: {part: "encoders" if part in encoders else "denoiser" for part in params},
        )
    transform = optax.chain(optax.clip_by_global_norm(settings.max_grad_norm), transform)
    return _counted_from(first, Optimizer(transform, of_denoiser.learning_rate))


def _counted_from(first: int, optimizer: Optimizer) -> Optimizer:
    """The optimizer whose schedules begin after so many updates; its moments go on, and so does their correction.

    Updates that were skipped do not count, so that a stage may begin before its count does: its rate waits.
    """
    if not first:
        return optimizer
    transform, rate = optimizer

    def is_schedule(state: PyTree) -> bool:
        return isinstance(state, optax.ScaleByScheduleState)

    def from_first(state: PyTree) -> PyTree:
        return state._replace(count=jnp.maximum(state.count - first, 0)) if is_schedule(state) else state

    def counted(new: PyTree, old: PyTree) -> PyTree:
        return old._replace(count=optax.safe_increment(old.count)) if is_schedule(old) else new

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None) -> tuple[PyTree, PyTree]:
        shifted = jax.tree.map(from_first, state, is_leaf=is_schedule)
        updates, new = transform.update(updates, shifted, params)
        return updates, jax.tree.map(counted, new, state, is_leaf=is_schedule)

    return Optimizer(
        optax.GradientTransformation(transform.init, update), lambda count: rate(jnp.maximum(count - first, 0))
    )


def _is_read(params: Mapping[str, Any], unread: tuple[str, ...]) -> PyTree:
    """Which parameters the loss depends on; the others have no gradient, and no decay either.

    Args:
        unread: what the paths of the others begin with.
    """
    name = partial(jax.tree_util.keystr, simple=True, separator="/")
    return jax.tree_util.tree_map_with_path(lambda path, _: not name(path).startswith(unread), params)
