"""A step whose parts have different sizes (`data.mixed_sizes`): a program for each size, and one that updates.

A part adds to the sums of loss and gradient over the examples, weighted by how many it has; the update divides by how
many there were, so that the loss is the mean over all examples of the step, however they are divided:

    loss = Σ n_i loss_i / Σ n_i         n_i the examples of part i, loss_i their mean
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from offsetjax.parallel.fsdp import Gradient
from offsetjax.training.objective import Batch, add_position
from offsetjax.training.programs import Program, by_size
from offsetjax.training.step import Counts, Metrics, TrainState, TrainStep

PART_LOSSES = "part_losses"  # beside a step's metrics: those of its parts, in their order


class Sums(NamedTuple):
    """Over the examples of a step, as far as its parts have been computed; or where these lie.

    Attributes:
        examples: how many, int32.
        loss: float32.
        gradients: as the parameters.
    """

    examples: Any
    loss: Any
    gradients: PyTree
    counts: Counts


def no_sums(params: PyTree) -> Sums:
    """Before the first part."""
    none = Counts(jnp.zeros((), jnp.uint32), jnp.zeros((), jnp.uint32))
    return Sums(jnp.zeros((), jnp.int32), jnp.zeros(()), jax.tree.map(jnp.zeros_like, params), none)


def make_part(gradient: Gradient) -> Callable[..., tuple[Sums, Float[Array, ""]]]:
    """(sums, params, frozen, part, step) → the sums with those of a part, and its loss.

    Args:
        gradient: of a whole part; the place of an example, which decides on its draws, is that in the whole batch.
    """

    def train_step(sums: Sums, params: PyTree, frozen: PyTree, part: Batch, step: Array) -> tuple[Sums, Array]:
        count = len(part["is_truncated"])
        part = add_position(part, count)
        part["position"] += sums.examples
        loss, gradients = gradient(params, frozen, part, step)
        counts = Counts(
            sums.counts.truncated + part["is_truncated"].sum(dtype=jnp.uint32),
            sums.counts.replaced + part["is_replaced"].sum(dtype=jnp.uint32),
        )
        gradients = jax.tree.map(lambda total, own: total + count * own, sums.gradients, gradients)
        return Sums(sums.examples + count, sums.loss + count * loss, gradients, counts), loss

    return train_step


def make_finish(
    apply: Callable[..., tuple[TrainState, Metrics]], reads_captions: bool
) -> Callable[[TrainState, Sums], tuple[TrainState, Metrics]]:
    """(state, sums of all parts) → (state, metrics)."""

    def finish(state: TrainState, sums: Sums) -> tuple[TrainState, Metrics]:
        gradients = jax.tree.map(lambda total: total / sums.examples, sums.gradients)
        return apply(state, sums.loss / sums.examples, gradients, sums.counts, reads_captions)

    return finish


@dataclass(frozen=True)
class MixedStep:
    """A train step that takes the parts of a batch as a sequence.

    Attributes:
        begin, part, finish: jitted `no_sums`, and what `make_part` and `make_finish` give.
    """

    begin: Any
    part: Any
    finish: Any

    def __call__(self, state: TrainState, frozen: PyTree, parts: Sequence[Batch]) -> tuple[TrainState, Metrics]:
        sums, losses = self.begin(state.params), []
        for part in parts:
            sums, loss = self.part(sums, state.params, frozen, part, state.step)
            losses.append(loss)
        state, metrics = self.finish(state, sums)
        return state, {**metrics, PART_LOSSES: tuple(losses)}


def programs_of(
    step: TrainStep, state: TrainState, frozen: PyTree, batches: Mapping[str, Batch], of_stage: str = ""
) -> list[Program]:
    """All that a jitted train step, or one of parts, compiles for batches by the names of their sizes."""
    if not isinstance(step, MixedStep):
        return [
            Program(f"the step for {name}{of_stage}", step, (state, frozen, batch), place=2)
            for name, batch in batches.items()
        ]
    sums = jax.eval_shape(no_sums, state.params)
    sized = [
        Program(f"the step for {name}{of_stage}", step.part, (sums, state.params, frozen, batch, state.step), place=3)
        for name, batch in batches.items()
    ]
    begin, finish = (step.begin, (state.params,)), (step.finish, (state, sums))
    return [*sized, Program(f"the zeros{of_stage}", *begin), Program(f"the update{of_stage}", *finish)]


def with_compiled(step: TrainStep, compiled: Sequence[tuple[Program, Any]]) -> TrainStep:
    """The step with what `programs_of` gave of it compiled."""
    if not isinstance(step, MixedStep):
        return by_size(step, compiled)
    *sized, (_, begin), (_, finish) = compiled
    return MixedStep(begin, by_size(step.part, sized), finish)
