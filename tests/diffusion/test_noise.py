"""Offset noise has the covariance of its formula, and its bits depend on the key alone."""

import doctest
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from offsetjax.diffusion.noise import batch_noise, offset_noise
from offsetjax.sharding import mesh_of


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_noise_has_the_shape_and_the_type_of_the_latent(dtype: jnp.dtype) -> None:
    noise = offset_noise(jax.random.key(0), jnp.full((4, 6, 8), jnp.nan, dtype), 0.1)
    assert noise.shape == (4, 6, 8) and noise.dtype == dtype
    assert jnp.isfinite(noise).all(), "the latent's values are used"


def test_strength_zero_is_plain_noise_bit_for_bit_and_strength_only_adds_a_constant_to_each_channel() -> None:
    key, latent = jax.random.key(7), jnp.zeros((4, 8, 8))
    plain = offset_noise(key, latent, 0.0)
    np.testing.assert_array_equal(plain, jax.random.normal(jax.random.split(key)[0], latent.shape))
    shifts = [np.asarray(offset_noise(key, latent, strength) - plain, np.float64) for strength in (0.1, 1.0)]
    for shift in shifts:
        assert np.ptp(shift, axis=(1, 2)).max() < 1e-6
    np.testing.assert_allclose(shifts[0] * 10, shifts[1], atol=1e-5)
    assert np.ptp(shifts[1][:, 0, 0]) > 0.1, "all channels are shifted alike"


@pytest.mark.parametrize("strength", [0.0, 0.1, 0.5])
def test_the_covariance_is_the_identity_but_for_the_zero_frequency_mode(strength: float) -> None:
    count, channels, side = 8192, 2, 8
    keys = jax.random.split(jax.random.key(1), count)
    noise = np.asarray(batch_noise(keys, (channels, side, side), strength), np.float64)
    modes = scipy.fft.dctn(noise, axes=(2, 3), norm="ortho").reshape(count, -1)
    expected = np.ones(channels * side**2)
    expected[:: side**2] = 1 + strength**2 * side**2

    covariance = modes.T @ modes / count
    standard_error = np.sqrt(np.outer(expected, expected) / count)
    score = (covariance - np.diag(expected)) / standard_error
    assert np.abs(np.diag(score) / np.sqrt(2)).max() < 4
    np.fill_diagonal(score, 0)
    assert np.abs(score).max() < 5  # the largest of 8,128 pairs
    assert np.abs(modes.mean(0) / np.sqrt(expected / count)).max() < 4


def test_a_batch_is_its_examples_one_by_one() -> None:
    keys, latents = jax.random.split(jax.random.key(2), 5), jnp.zeros((5, 4, 8, 8))
    batch = jax.vmap(offset_noise, in_axes=(0, 0, None))(keys, latents, 0.1)
    np.testing.assert_array_equal(batch, batch_noise(keys, (4, 8, 8), 0.1))
    for i in range(5):
        np.testing.assert_array_equal(batch[i], offset_noise(keys[i], latents[i], 0.1))


@pytest.mark.parametrize(
    ("data", "fsdp", "output"),
    [
        (2, 1, P(("data", "fsdp"))),
        (8, 1, P(("data", "fsdp"))),
        (1, 4, P("data", "fsdp")),
        (2, 4, P(None, None, ("data", "fsdp"))),  # an example, too, is split
    ],
)
def test_the_bits_do_not_depend_on_the_mesh(data: int, fsdp: int, output: P) -> None:
    keys = jax.random.split(jax.random.key(3), 8)
    mesh = mesh_of(data=data, fsdp=fsdp)
    sharded_keys = jax.device_put(keys, NamedSharding(mesh, P(("data", "fsdp"))))

    def draw(keys: jax.Array) -> jax.Array:
        return batch_noise(keys, (4, 8, 8), 0.1)

    noise = jax.jit(draw, out_shardings=NamedSharding(mesh, output))(sharded_keys)
    assert len(noise.sharding.device_set) == data * fsdp
    np.testing.assert_array_equal(noise, jax.jit(draw)(keys))


@pytest.mark.parametrize("name", ["noise", "schedule", "loss", "sampler"])
def test_the_examples_in_the_docstrings_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"offsetjax.diffusion.{name}"))
    assert result.failed == 0
    assert result.attempted or name != "noise"
