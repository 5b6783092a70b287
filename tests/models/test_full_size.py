"""Stable Diffusion 1 at full size, with random weights, on this machine: needs 22 GiB of memory and two minutes."""

import gc
import resource
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jaxtyping import Array, PyTree

from offsetjax.config import default_config, presets
from offsetjax.models.unet import UNet
from tests.compilation import usual_compilation
from tests.torch_models import counterpart, params_of, relative_error


def report(what: str, since: float) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{what}: {time.monotonic() - since:.1f} s, most memory so far {peak:.1f} GiB")


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def from_pytorch(unet: UNet, inputs: tuple[np.ndarray, ...]) -> tuple[PyTree, torch.Tensor]:
    """PyTorch's weights as ours, and its prediction; the model itself is given up."""
    start = time.monotonic()
    theirs = counterpart(unet)
    report("PyTorch, drawing the weights", start)
    start = time.monotonic()
    with torch.no_grad():
        prediction = theirs(*map(torch.from_numpy, inputs)).sample
    report("PyTorch, forward", start)
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params_of(theirs, unet)), prediction


def timed(what: str, function: Any, *arguments: Any) -> Any:
    """The function's result, waited for, and the seconds of compiling and of running."""
    start = time.monotonic()
    # The CPU's usual order of operations keeps twice as much in memory, for the sake of running several at once.
    options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    compiled = function.lower(*arguments).compile(compiler_options=options)
    report(f"{what}, compiling", start)
    start = time.monotonic()
    result = jax.block_until_ready(compiled(*arguments))
    report(what, start)
    return result


@pytest.fixture(autouse=True)
def _compiled_as_usual() -> Iterator[None]:
    with usual_compilation():
        yield


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_stable_diffusion_1_at_full_size_predicts_as_pytorch_does_and_learns_as_its_gradients_foresee() -> None:
    config = default_config()
    presets.stable_diffusion_1(config)
    unet = UNet(config.model.unet.to_dict(), jnp.dtype("float32"))
    inputs = normal(1, 4, 64, 64), np.array([500], np.int32), normal(1, 77, 768)
    params, expected = from_pytorch(unet, inputs)
    gc.collect()
    error = relative_error(timed("forward", jax.jit(unet.apply), params, *inputs), expected)
    print(f"largest difference from PyTorch, in terms of the largest value: {error:.1e}")
    assert error < 1e-4

    noise = normal(1, 4, 64, 64)[..., ::-1].copy()
    # Adam's first step moves all 860 M weights by nearly this much: at 1e-5 it already leaps over the minimum.
    optimizer = optax.adamw(1e-7)

    def loss(params: PyTree) -> Array:
        return jnp.square(unet.apply(params, *inputs) - noise).mean()

    def step(params: PyTree, state: PyTree) -> tuple[PyTree, PyTree, Array, Array]:
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        foreseen = optax.tree.vdot(gradients, updates)
        return optax.apply_updates(params, updates), state, value, foreseen

    state = jax.jit(optimizer.init)(params)
    step_in_place = jax.jit(step, donate_argnums=(0, 1))
    params, state, before, foreseen = timed("training step", step_in_place, params, state)
    del state
    change = timed("loss", jax.jit(loss), params) - before
    print(f"loss {before:.4f}, its change {change:.5f}, foreseen by the gradients {foreseen:.5f}")
    assert change < 0
    assert abs(change - foreseen) < 0.1 * abs(foreseen)
