"""Programs of several sizes are compiled before the first step; losses and rates are reported by size."""

import logging
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offsetjax.data.buckets import Size
from offsetjax.training.programs import Program, SizeLosses, by_size, compiled_ahead

SIZES = (Size(4, 2), Size(2, 4), Size(3, 3))


def batch(size: Size, make: Any) -> dict[str, Any]:
    return {"pixels": make((5, size.height, size.width, 3), jnp.uint8)}


def test_each_size_is_compiled_once_and_before_it_comes(caplog: pytest.LogCaptureFixture) -> None:
    traced, progress = [], []

    @jax.jit
    def train_step(state: jax.Array, frozen: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        traced.append(batch["pixels"].shape)
        return state + 1, {"loss": batch["pixels"].sum() * frozen}

    abstract = {size: batch(size, jax.ShapeDtypeStruct) for size in SIZES}
    with caplog.at_level(logging.INFO, "offsetjax"):
        given = jnp.zeros(()), jnp.ones(())
        sizes = abstract.items()
        programs = [Program(f"the step for {size}", train_step, (*given, each), place=2) for size, each in sizes]
        compiled = compiled_ahead(programs, 2, lambda: progress.append(1))
        step = by_size(train_step, zip(programs, compiled, strict=True))
    lines = [re.sub(r"\d+\.\d+ s", "T", record.message) for record in caplog.records]
    assert sorted(line.split(" (")[0] for line in lines[:3]) == sorted(
        f"the step for {s} was compiled in T" for s in SIZES
    )
    assert lines[3] == "the steps for all 3 sizes are there after T" and len(progress) == 6
    assert traced[0] == (5, 3, 3, 3) and len(traced) == 3, "the largest first"
    state = jnp.zeros(())
    for size in (*SIZES, *SIZES):
        state, metrics = step(state, jnp.ones(()), batch(size, jnp.ones))
        assert float(metrics["loss"]) == 5 * size.pixels * 3
    assert len(traced) == 3 and float(state) == 6
    step(state, jnp.ones(()), batch(Size(9, 9), jnp.ones))  # another takes the usual way
    assert len(traced) == 4


def test_a_program_that_fails_ends_the_others() -> None:
    def train_step(state: Any, frozen: Any, batch: Any) -> Any:
        if batch["pixels"].shape[1] == 4:
            raise ValueError("does not fit")
        return state, {}

    step, given = jax.jit(train_step), (jnp.zeros(()), jnp.ones(()))
    programs = [Program(str(size), step, (*given, batch(size, jax.ShapeDtypeStruct)), place=2) for size in SIZES]
    with pytest.raises(ValueError, match="does not fit"):
        compiled_ahead(programs, 2)


def test_losses_are_means_since_the_last_line_of_all_sizes_and_of_each() -> None:
    losses = SizeLosses(lambda step: (SIZES[step % 2],))
    for step, loss in enumerate((1.0, 2.0, 3.0, np.nan, 9.0)):
        losses.add(step, jnp.float32(loss))
    assert losses.means(3) == {"loss_of_sizes": 2.0, "loss_2x4": 2.0, "loss_4x2": 2.0}
    assert losses.means(4) == {"loss_of_sizes": 9.0, "loss_4x2": 9.0}
    assert losses.means(5) == {}


def test_losses_of_parts_are_of_their_own_sizes() -> None:
    losses = SizeLosses(lambda step: (SIZES[0], SIZES[step % 2]))
    for step in range(2):
        losses.add(step, jnp.float32(1.0), jnp.float32(5.0))
    assert losses.means(1) == {"loss_of_sizes": 3.0, "loss_2x4": 5.0, "loss_4x2": pytest.approx(7 / 3)}
