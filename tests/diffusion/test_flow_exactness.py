"""No network, as in test_exactness.py: for normal data every sampler of a flow gives back the data's distribution.

The best prediction of the velocity is linear a mode, for noise of the power `W + t^{2g} C`, g 1 where an offset grows
with time, and then with twice that offset in the target:

    v = -μ + k (x_t - (1-t) μ),    k = (t (W + (1+g) t^{2g} C) - (1-t) D) / ((1-t)² D + t² (W + t^{2g} C))
"""

from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offsetjax.config.schema import default_config
from offsetjax.diffusion import spread
from offsetjax.diffusion.flow import Flow
from offsetjax.diffusion.noise import Noise, make_noise
from offsetjax.diffusion.sampler import ANCESTRAL, NAMES, Name, Table, coefficients, solve
from offsetjax.diffusion.spread import Moments
from tests.diffusion.gaussian import exactly_told
from tests.diffusion.test_exactness import (
    CHANNELS,
    COUNT,
    KINDS,
    MEAN,
    POWER,
    RADIUS,
    SIDE,
    STRENGTH,
    TIMES,
    N,
    data_mean,
    noise_power,
)
from tests.tiny import quick_compilation

PROCESS = Flow()
SHIFT = 3.0
SHAPE = (CHANNELS, SIDE, SIDE)
BANDS = {"brightness": RADIUS == 0, "one wave": RADIUS == 1 / SIDE, "two waves": RADIUS == 2 / SIDE}
# An ancestral sampler of a flow cannot follow an offset that grows: the configs' rules refuse it.
PAIRS = [
    (name, kind)
    for name in NAMES
    for kind in KINDS
    if kind != "zero terminal snr" and not (kind == "adjusted" and name in ANCESTRAL)
]


@pytest.fixture(scope="module", autouse=True)
def _quickly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with quick_compilation(tmp_path_factory.getbasetemp()):
        yield


@cache
def noise_of(kind: str, strength: float = STRENGTH) -> Noise:
    config = default_config().noise
    config.update(KINDS[kind])
    if "offset_strength" in KINDS[kind]:
        config.offset_strength = strength
    return make_noise(config, PROCESS, downscale=8)


@cache
def powers(kind: str, strength: float = STRENGTH) -> tuple[np.ndarray, np.ndarray, int]:
    """W, C and g, by formula."""
    offset = np.zeros_like(POWER)
    offset[:, 0, 0] = strength**2 * N
    if kind == "adjusted":
        return np.ones_like(POWER), offset, 1
    if kind == "offset":
        return np.ones_like(POWER), offset, 0
    return noise_power(kind)[-1], np.zeros_like(POWER), 0


def table_of(name: Name, num_steps: int) -> Table:
    return exactly_told(coefficients(name, PROCESS.grid(name, num_steps, "trailing", SHIFT)))


def slope(t: Any, data: Any, pixels: Any, offset: Any, grows: int) -> Any:
    """k; `t**(2 g)` with a traced t as well."""
    grown = t ** (2 * grows) * offset
    noise = t * (pixels + (1 + grows) * grown)
    return (noise - (1 - t) * data) / ((1 - t) ** 2 * data + t**2 * (pixels + grown))


def follow(name: Name, kind: str, num_steps: int, begin: Moments, strength: float = STRENGTH) -> Moments:
    """The moments at the end; `x̂0 = μ + (1 - t k) (x_t - (1-t) μ)`."""
    table, (pixels, offset, grows), mu = table_of(name, num_steps), powers(kind, strength), data_mean()
    guesses = [(mu, 1 - t * slope(t, POWER, pixels, offset, grows), (1 - t) * mu) for t in np.asarray(table.timesteps)]
    return spread.follow(table, guesses, begin, pixels + offset)


def noise_alone(kind: str, strength: float = STRENGTH) -> Moments:
    pixels, offset, _ = powers(kind, strength)
    return Moments(np.zeros_like(POWER), pixels + offset)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_noise_alone_becomes_the_data_the_better_the_more_steps(name: Name, kind: str) -> None:
    """Nothing is lost at the start, under any noise: unlike a variance-preserving process, a flow starts there."""
    errors = []
    for num_steps in (250, 1000):
        end = follow(name, kind, num_steps, noise_alone(kind))
        np.testing.assert_allclose(end.mean[:, 0, 0] / np.sqrt(N), MEAN, atol=0.002)
        errors.append(np.abs(end.variance / POWER - 1).max())
    assert errors[0] < 0.06 and errors[1] < 0.02, errors
    assert errors[1] < 0.5 * errors[0] or errors[0] < 0.005


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ANCESTRAL])
@pytest.mark.parametrize(("strength", "share"), [(0.8, 0.078), (0.4, 0.154)])
@pytest.mark.parametrize("kind", ["offset", "adjusted"])
def test_a_plain_start_shrinks_brightness_as_the_formula_says(
    name: Name, strength: float, share: float, kind: str
) -> None:
    """`√(1 / (1 + c² N))`, whatever the steps: 8 % and 15 % for c² N of strength .1 at 1024 and at 512 px."""
    plain = Moments(np.zeros_like(POWER), np.ones_like(POWER))
    for num_steps in (6, 200):
        matched, lost = (
            follow(name, kind, num_steps, begin, strength).variance for begin in (noise_alone(kind, strength), plain)
        )
        ratio = np.sqrt(lost / matched)
        np.testing.assert_allclose(ratio[:, 0, 0], np.sqrt(1 / (1 + strength**2 * N)), rtol=1e-6)
        assert ratio[0, 0, 0] == pytest.approx(share, abs=5e-4)
        np.testing.assert_allclose(ratio[:, 1:], 1.0, rtol=1e-9)  # the other modes have the noise that they know


@jax.jit
def run(start: jax.Array, injected: Any, data: Any, pixels: Any, offset: Any, grown: Any, row: Any) -> jax.Array:
    """The sampler's ends; `offset` is the power of one that stays, `grown` of one that grows."""
    mean = jnp.asarray(MEAN, jnp.float32)[:, None, None]

    def denoiser(noisy: jax.Array, told: jax.Array) -> jax.Array:
        t = told / 1000
        power = pixels + offset + t**2 * grown
        k = (t * (power + t**2 * grown) - (1 - t) * data) / ((1 - t) ** 2 * data + t**2 * power)
        return -mean + jnp.fft.irfft2(k * jnp.fft.rfft2(noisy - (1 - t) * mean), s=(SIDE, SIDE))

    inject = None if injected is None else lambda index: injected[index]
    return solve(denoiser, PROCESS, Table(**row), start, inject)


@cache
def start_of(kind: str) -> jax.Array:
    keys = jax.random.split(jax.random.key(5), COUNT)
    return jax.jit(jax.vmap(lambda key: noise_of(kind).start(key, SHAPE)))(keys)


@cache
def injected_of(kind: str, num_steps: int) -> jax.Array:
    keys = jax.random.split(jax.random.key(6), num_steps * COUNT)
    return jax.jit(jax.vmap(lambda key: noise_of(kind).inject(key, SHAPE)))(keys).reshape(num_steps, COUNT, *SHAPE)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_samples_have_the_moments_of_the_recurrence(name: Name, kind: str) -> None:
    """Mean and spread of brightness and of two low frequencies, within four standard errors."""
    row = {field.name: getattr(table_of(name, 6), field.name) for field in fields(Table)}
    pixels, offset, grows = (jnp.asarray(each, jnp.float32) for each in powers(kind))
    injected = injected_of(kind, 6) if name in ANCESTRAL else None
    data = jnp.asarray(POWER, jnp.float32)
    end = run(start_of(kind), injected, data, pixels, (1 - grows) * offset, grows * offset, row)
    modes = np.fft.rfft2(np.asarray(end, np.float64), norm="ortho")
    expected = follow(name, kind, 6, noise_alone(kind))
    for band, inside in BANDS.items():
        variance, count = expected.variance[:, inside], TIMES[inside].sum()
        error = (modes - expected.mean)[..., inside]
        scale = np.sqrt(variance / COUNT)
        assert (np.abs(error.mean(0)) < 5 * scale).all(), band
        seen = ((np.abs(error) ** 2).mean(0) / variance * TIMES[inside]).sum(-1) / count
        assert (np.abs(seen - 1) < 4 * np.sqrt(2 / (COUNT * count))).all(), (band, seen)
