"""Stable Diffusion 1 at full size, with random weights, on this machine: needs 18 GiB of memory and ten minutes."""

import gc
import resource
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jaxtyping import Array, PyTree

from offsetjax import presets
from offsetjax.config import default_config
from offsetjax.models.unet import UNet
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
    """The function's result, waited for; compiling is not counted."""
    start = time.monotonic()
    compiled = function.lower(*arguments).compile()
    report(f"{what}, compiling", start)
    start = time.monotonic()
    result = jax.block_until_ready(compiled(*arguments))
    report(what, start)
    return result


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_stable_diffusion_1_at_full_size_predicts_as_pytorch_does_and_learns() -> None:
    config = default_config()
    presets.stable_diffusion_1(config)
    unet = UNet(config.model.unet.to_dict(), jnp.dtype("float32"))
    inputs = normal(1, 4, 64, 64), np.array([500], np.int32), normal(1, 77, 768)
    params, expected = from_pytorch(unet, inputs)
    gc.collect()

    assert relative_error(timed("forward", jax.jit(unet.apply), params, *inputs), expected) < 1e-4

    noise = normal(1, 4, 64, 64)[..., ::-1].copy()

    def loss(params: PyTree) -> Array:
        return jnp.square(unet.apply(params, *inputs) - noise).mean()

    before, gradients = timed("loss and gradients", jax.jit(jax.value_and_grad(loss)), params)
    # The moments are made after the gradients, whose activations need the room: 9.6 GiB of state and 13.9 GiB of
    # gradients and activations would be more than this machine has.
    optimizer = optax.adamw(1e-5)
    state = jax.jit(optimizer.init)(params)

    def update(params: PyTree, state: PyTree, gradients: PyTree) -> tuple[PyTree, PyTree]:
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params, state = timed("AdamW", jax.jit(update, donate_argnums=(0, 1, 2)), params, state, gradients)
    after = timed("loss", jax.jit(loss), params)
    print(f"loss {before:.4f}, after one step {after:.4f}")
    assert after < before
