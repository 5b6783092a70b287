"""Streams are independent of each other and a function of (seed, name, step, example) alone."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offsetjax.rng import stream_key
from offsetjax.training.objective import batch_keys

DRAWS = 1 << 17  # the correlation of independent draws has a standard deviation of 0.003


def _keys(seed: int, step: int, count: int) -> jax.Array:
    """The keys of a batch's examples, as the objective takes them."""
    return batch_keys(seed, "noise", jnp.int32(step), {"position": jnp.arange(count)})


def _draw(seed: int, name: str, step: int) -> np.ndarray:
    return np.asarray(jax.random.normal(stream_key(seed, name, step), (DRAWS,)))


def test_streams_of_different_names_steps_and_seeds_are_uncorrelated() -> None:
    names = ("vae", "noise", "timestep", "caption_dropout", "sample", "init/unet")
    streams = [_draw(0, name, step) for name in names for step in (0, 1, 999)]
    streams += [_draw(seed, "noise", 0) for seed in (1, 2**31, 2**32 - 1)]
    correlations = np.abs(np.corrcoef(streams) - np.eye(len(streams)))
    assert correlations.max() < 0.015, correlations.max()
    assert np.sqrt(np.mean(correlations**2)) < 0.01


def test_examples_are_uncorrelated() -> None:
    keys = _keys(0, 3, 8)
    draws = np.asarray(jax.vmap(lambda key: jax.random.normal(key, (DRAWS,)))(keys))
    correlations = np.abs(np.corrcoef(draws) - np.eye(len(draws)))
    assert correlations.max() < 0.015
    assert np.sqrt(np.mean(correlations**2)) < 0.01


def test_an_examples_key_does_not_depend_on_the_size_of_the_batch() -> None:
    data = jax.random.key_data(_keys(7, 11, 64))
    for count in (1, 2, 8, 63):
        assert jnp.array_equal(jax.random.key_data(_keys(7, 11, count)), data[:count])


def test_a_step_inside_jit_draws_what_it_draws_outside() -> None:
    traced = jax.jit(lambda step: jax.random.key_data(stream_key(5, "noise", step)))
    for step in (0, 1, 2**31 - 1):
        assert jnp.array_equal(traced(jnp.int32(step)), jax.random.key_data(stream_key(5, "noise", step)))


@pytest.mark.parametrize("salt", ["0", "1"])
def test_another_process_draws_the_same(salt: str) -> None:
    program = "import jax; from offsetjax.rng import stream_key; print(jax.random.key_data(stream_key(9, 'vae', 2)))"
    environment = {"PYTHONHASHSEED": salt, "PYTHONPATH": ":".join(sys.path), "JAX_PLATFORMS": "cpu"}
    out = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(jax.random.key_data(stream_key(9, "vae", 2)))
