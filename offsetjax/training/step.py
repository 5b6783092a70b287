"""`TrainState` and the pure `train_step`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt32
from ml_collections import ConfigDict

from offsetjax.models.family import family_of
from offsetjax.parallel.finite import all_finite
from offsetjax.parallel.fsdp import Gradient
from offsetjax.training.objective import Batch, Objective, add_position
from offsetjax.training.optimizer import Optimizer, make_optimizer
from offsetjax.training.spikes import followed, no_spikes, spike_ratio

Metrics = Mapping[str, Float[Array, ""]]
# (state, frozen, batch) → (state, metrics); a batch whose parts differ in size is a sequence of them (`mixed.py`).
TrainStep = Callable[["TrainState", PyTree, Any], tuple["TrainState", Metrics]]


@flax.struct.dataclass
class TrainState:
    """All that a step changes, and so all that a checkpoint holds; frozen parts are not in it."""

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    ema_params: PyTree  # None without an average
    skipped: Int[Array, ""]  # steps that changed nothing
    truncated: UInt32[Array, ""]  # captions that were cut to the text encoders' length
    replaced: UInt32[Array, ""]  # records that could not be read, and so left out
    spikes: PyTree = None  # None without train.max_spike


@dataclass(frozen=True)
class Update:
    """How a gradient changes the state.

    Attributes:
        ema_decay: of the average of the parameters; 0: there is none.
        max_spike: how many times its usual size a loss or a gradient may have; 0: any.
    """

    optimizer: Optimizer
    ema_decay: float = 0.0
    max_spike: float = 0.0


def make_update(optimizer: ConfigDict, train: ConfigDict, model: ConfigDict, steps: range | None = None) -> Update:
    """The update that these sections of a config say.

    Args:
        steps: of a stage, as the numbers of updates before each; None: all that the section `train` says.

    Raises:
        UserError: an unknown `optimizer.name`.
    """
    family = family_of(model)
    steps = range(train.steps) if steps is None else steps
    made = make_optimizer(optimizer, len(steps), family.encoders, family.unread(model), steps.start)
    return Update(made, optimizer.ema_decay, train.max_spike)


def init_state(params: PyTree, update: Update) -> TrainState:
    """The state before the first step; the average starts at the parameters."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=update.optimizer.transform.init(params),
        ema_params=jax.tree.map(jnp.copy, params) if update.ema_decay else None,
        skipped=jnp.zeros((), jnp.int32),
        truncated=jnp.zeros((), jnp.uint32),
        replaced=jnp.zeros((), jnp.uint32),
        spikes=no_spikes() if update.max_spike else None,
    )


def make_gradient(objective: Objective, parts: int = 1) -> Gradient:
    """(params, frozen, batch, step) → the mean loss of a batch and its gradient, in so many parts of the batch."""

    def gradient(params: PyTree, frozen: PyTree, batch: Batch, step: Array) -> tuple[Float[Array, ""], PyTree]:
        def loss(params: PyTree, part: Batch) -> Float[Array, ""]:
            return objective(params, frozen, part, step).mean()

        return accumulate(loss, params, batch, parts)

    return gradient


def make_train_step(
    gradient: Gradient,
    update: Update,
    is_finite: Callable[[PyTree], Bool[Array, ""]] = all_finite,
    saves_memory: bool = False,
) -> TrainStep:
    """The pure step: (state, frozen, batch) → (state, metrics), to be jitted with shardings and a donated state.

    A step whose loss or gradient is not finite or, by choice, a spike, or that would write what is not finite, changes
    nothing but the counters.

    Args:
        gradient: of a whole batch: `make_gradient`'s, or on several devices `fsdp.on_mesh` of it.
        is_finite: of what is written; on several devices they must agree.
        saves_memory: the update is computed to be looked at, and once more to be written. Accelerators' compilers would
            else hold the state before and after it at once; that for CPUs holds little of it, and compiles faster so.
    """
    apply = make_apply(update, is_finite, saves_memory)

    def train_step(state: TrainState, frozen: PyTree, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = add_position(batch, len(batch["is_truncated"]))
        loss, gradients = gradient(state.params, frozen, batch, state.step)
        counts = Counts(*(batch[name].sum(dtype=jnp.uint32) for name in ("is_truncated", "is_replaced")))
        # An autoencoder's training reads no captions.
        return apply(state, loss, gradients, counts, bool(batch.get("input_ids")))

    return train_step


class Counts(NamedTuple):
    """Of a batch: captions that were cut, and records that could not be read, uint32; or where these numbers lie."""

    truncated: Any
    replaced: Any


def make_apply(
    update: Update, is_finite: Callable[[PyTree], Bool[Array, ""]] = all_finite, saves_memory: bool = False
) -> Callable[..., tuple[TrainState, Metrics]]:
    """What follows a gradient: (state, loss, gradients, counts, reads_captions) → (state, metrics).

    Args:
        update, is_finite, saves_memory: as for `make_train_step`.
    """
    optimizer, rate = update.optimizer
    max_spike = update.max_spike

    def updated(state: TrainState, gradients: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return params, opt_state, _average(state, params, update.ema_decay)

    def apply(
        state: TrainState, loss: Float[Array, ""], gradients: PyTree, counts: Counts, reads_captions: bool
    ) -> tuple[TrainState, Metrics]:
        grad_norm = optax.tree.norm(gradients)
        is_taken = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        metrics = {"loss": loss, "grad_norm": grad_norm}
        spikes = state.spikes
        if max_spike:
            metrics["spike"] = spike_ratio(spikes, loss, grad_norm)
            is_taken &= metrics["spike"] <= max_spike

        params, opt_state, ema_params = updated(state, gradients)
        # What is written. The average is finite where the parameters are, a part of which goes into it at each step.
        is_taken &= is_finite({"opt_state": opt_state, "params": params if ema_params is None else ema_params})
        if saves_memory:
            state, gradients, is_taken = jax.lax.optimization_barrier((state, gradients, is_taken))
            params, opt_state, ema_params = updated(state, gradients)
        new, old = (params, opt_state, ema_params), (state.params, state.opt_state, state.ema_params)
        params, opt_state, ema_params = jax.tree.map(lambda n, o: jnp.where(is_taken, n, o), new, old)
        if max_spike:
            spikes = followed(spikes, loss, grad_norm, is_taken)

        skipped = state.skipped + (~is_taken).astype(jnp.int32)
        truncated, replaced = state.truncated + counts.truncated, state.replaced + counts.replaced
        applied = rate(state.step - state.skipped)  # a skipped step does not count in the schedule
        metrics |= {"learning_rate": applied, "skipped": skipped, "records_replaced": replaced}
        if reads_captions:
            metrics["captions_truncated"] = truncated
        return TrainState(state.step + 1, params, opt_state, ema_params, skipped, truncated, replaced, spikes), metrics

    return apply


def accumulate(
    loss: Callable[[PyTree, Batch], Float[Array, ""]], params: PyTree, batch: Batch, parts: int
) -> tuple[Float[Array, ""], PyTree]:
    """The loss and gradient of the whole batch, `parts` equal pieces of it one after another."""
    if parts == 1:
        return jax.value_and_grad(loss)(params, batch)
    # Part j takes examples j, j + parts, …: each device then keeps the examples that it holds.
    pieces = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)

    def add(total: Any, piece: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, piece)), None

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    return jax.tree.map(lambda x: x / parts, jax.lax.scan(add, zero, pieces)[0])


def _average(state: TrainState, params: PyTree, decay: float) -> PyTree:
    if not decay:
        return None
    # The usual warm-up, min(decay, (1 + t) / (10 + t)), so that the start is forgotten soon.
    step = state.step.astype(jnp.float32)
    return optax.incremental_update(params, state.ema_params, 1.0 - jnp.minimum(decay, (1.0 + step) / (10.0 + step)))
