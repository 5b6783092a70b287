"""No network: for normal data every sampler, under every noise, gives back the data's distribution.

Data and noise are normal and diagonal in the Fourier basis, so that the best prediction is known and linear a mode:

    x_t = α x0 + σ n,    E[x0 | x_t] = μ + α P / (α² P + σ² S) (x_t - α μ)        P, S: power of the data, of the noise

and so is a sampler, whose moments can be followed through its table. With infinitely many steps a deterministic sampler
is the map x_T → μ + √(P / V) (x_T - α_T μ), V = α_T² P + σ_T² S, and an ancestral one draws x0 from p(x0 | x_T).
"""

from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offsetjax.config.schema import default_config
from offsetjax.diffusion import spread
from offsetjax.diffusion.noise import Noise, make_noise
from offsetjax.diffusion.sampler import ANCESTRAL, NAMES, Name, Table, coefficients, solve
from offsetjax.diffusion.spectrum import pyramid_spectrum
from offsetjax.diffusion.spread import Moments
from offsetjax.diffusion.variance_preserving import VariancePreserving, variance_preserving
from tests.tiny import quick_compilation

SIDE, CHANNELS, COUNT = 16, 2, 512
N = SIDE**2
MEAN = np.array([0.4, -0.25])  # brightness
BRIGHTNESS_STD = np.array([0.33, 0.2])
STRENGTH = 0.4  # at 16x16 what 0.1 is at 64x64
CHANNEL_STRENGTHS = (0.4, 0.25)
FORMULA = "where(f == 0, 1 + 0.16 * N, 0.7 + 0.02 / (f + 0.05) ** 2)"
FY, FX = np.meshgrid(np.fft.fftfreq(SIDE), np.fft.rfftfreq(SIDE), indexing="ij")
RADIUS = np.hypot(FY, FX)
BANDS = {"brightness": RADIUS == 0, "mid": (RADIUS > 0.15) & (RADIUS < 0.25), "high": RADIUS > 0.45}
TIMES = np.where((FX == 0) | (FX == 0.5), 1, 2)  # how many modes an entry of the half spectrum stands for

# Of the data: falls with frequency as that of pictures does.
POWER = np.where(RADIUS == 0, (N * BRIGHTNESS_STD**2)[:, None, None], 0.2 + 0.05 / (RADIUS + 0.05) ** 2)

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "zero terminal snr": {},
    "offset": {"offset_strength": STRENGTH},
    "channels": {"channel_strengths": CHANNEL_STRENGTHS},
    "pyramid": {"kind": "pyramid", "pyramid_discount": 0.3, "pyramid_levels": 6},
    "pyramid with offset": {
        "kind": "pyramid",
        "pyramid_discount": 0.3,
        "pyramid_levels": 6,
        "offset_strength": STRENGTH,
    },
    "spectral": {"kind": "spectral", "spectrum": (FORMULA,)},
    "adjusted": {"kind": "adjusted", "offset_strength": STRENGTH},
}


# Heun's method divides by the signal, of which a zero terminal SNR has none.
PAIRS = [(name, kind) for name in NAMES for kind in KINDS if (name, kind) != ("heun", "zero terminal snr")]


@pytest.fixture(scope="module", autouse=True)
def _quickly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with quick_compilation(tmp_path_factory.getbasetemp()):
        yield


@cache
def process_of(kind: str, prediction_type: str = "epsilon") -> VariancePreserving:
    return variance_preserving(1000, 0.00085, 0.012, prediction_type, zero_terminal_snr=kind == "zero terminal snr")


@cache
def noise_of(kind: str) -> Noise:
    config = default_config().noise
    config.update(KINDS[kind])
    return make_noise(config, process_of(kind), downscale=8)


@cache
def noise_power(kind: str) -> np.ndarray:
    """`S` by formula, `[T, channels, modes]`; test_noise.py checks pyramid_spectrum by simulation."""
    power = np.ones((1000, CHANNELS, SIDE, SIDE // 2 + 1))
    if "pyramid" in kind:
        power = power * pyramid_spectrum(SIDE, SIDE, 0.3, 6)
    if "offset" in kind:
        power[..., 0, 0] += STRENGTH**2 * N
    if kind == "channels":
        power[..., 0, 0] += np.array(CHANNEL_STRENGTHS) ** 2 * N
    if kind == "spectral":
        power = power * np.where(RADIUS == 0, 1 + 0.16 * N, 0.7 + 0.02 / (RADIUS + 0.05) ** 2)
    if kind == "adjusted":
        kept = np.asarray(process_of(kind).alphas_cumprod, np.float64)
        power[..., 0, 0] += (STRENGTH**2 * N * (1 - kept) / kept / ((1 - kept[-1]) / kept[-1]))[:, None]
    return power


def data_mean() -> np.ndarray:
    mean = np.zeros_like(POWER)
    mean[:, 0, 0] = MEAN * np.sqrt(N)
    return mean


def shrink(kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`α`, `σ` `[T, 1, 1, 1]` and the gain `b` of `E[x0 | x_t] = μ + b (x_t - α μ)`."""
    kept = np.asarray(process_of(kind).alphas_cumprod, np.float64)[:, None, None, None]
    alpha, sigma = np.sqrt(kept), np.sqrt(1 - kept)
    return alpha, sigma, alpha * POWER / (kept * POWER + (1 - kept) * noise_power(kind))


def tables(name: Name, kind: str, num_steps: int, own_mean: bool = True) -> tuple[Table, Table | None]:
    """A sampler's table, and that of the mean where the noise of it changes with time."""
    grid = process_of(kind).grid(name, num_steps, "trailing")
    table = coefficients(name, grid)
    if kind != "adjusted" or name in ANCESTRAL or not own_mean:
        return table, None
    root = np.sqrt(noise_power(kind)[:, :, 0, 0])
    return table, coefficients(name, grid, (root[grid.timesteps], root[grid.timesteps_after]))


def injected_power(kind: str) -> np.ndarray:
    """Of what a step adds: the noise of training, but without the shift that an adjusted start has drawn for good."""
    return np.ones_like(POWER) if kind == "adjusted" else noise_power(kind)[-1]


def follow(kind: str, name: Name, num_steps: int, begin: Moments, injected: np.ndarray, **changes: Any) -> Moments:
    """The moments of each mode at the end, from those of the start and the power of the injected noise."""
    table, mean_table = tables(name, kind, num_steps, **changes)
    if mean_table is not None:
        table = replace(table, noisy=by_mode(table.noisy, mean_table.noisy), kept=by_mode(table.kept, mean_table.kept),
                        noise=by_mode(table.noise, mean_table.noise))  # fmt: skip
    alpha, _, gain = shrink(kind)
    mu = data_mean()
    return spread.follow(table, [(mu, gain[t], alpha[t] * mu) for t in table.timesteps], begin, injected)


def by_mode(rows: np.ndarray, mean_rows: np.ndarray) -> np.ndarray:
    """Coefficients `[n, 5]` or `[n]` of every mode, those of the channels' means from `[n, 5, c]` or `[n, c]`."""
    every = np.repeat(rows[..., None], CHANNELS, -1)[..., None, None] * np.ones(POWER.shape[1:])
    every[..., 0, 0] = mean_rows
    return every


def noisy_data(kind: str) -> Moments:
    """Of the training's `x_T`, where a trace of the data is left."""
    alpha, sigma, _ = shrink(kind)
    return Moments(alpha[-1] * data_mean(), alpha[-1] ** 2 * POWER + sigma[-1] ** 2 * noise_power(kind)[-1])


def pure_noise(kind: str, name: Name, power: np.ndarray) -> Moments:
    """Of a start without the data; Euler's, in coordinates that are noise on top of data, is smaller by √(1-ᾱ_T)."""
    scale = shrink(kind)[1][-1] ** 2 if name in ("euler", "euler_ancestral", "heun") else 1.0
    return Moments(np.zeros_like(POWER), scale * power * np.ones_like(POWER))


@pytest.mark.parametrize("kind", KINDS)
def test_power_is_that_of_the_formulas(kind: str) -> None:
    for timestep in (0, 1, 499, 899, 999):
        power = np.broadcast_to(noise_of(kind).power(SIDE, SIDE, timestep), POWER.shape)
        np.testing.assert_allclose(power, noise_power(kind)[timestep], rtol=1e-5)
        mean = (power * TIMES).sum((1, 2)).mean() / N
        assert noise_of(kind).variance(SIDE, SIDE, timestep) == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_noisy_data_become_the_data_again_the_better_the_more_steps(name: Name, kind: str) -> None:
    errors = []
    for num_steps in (250, 500, 1000):
        end = follow(kind, name, num_steps, noisy_data(kind), injected_power(kind))
        np.testing.assert_allclose(end.mean[:, 0, 0] / np.sqrt(N), MEAN, atol=0.003)
        errors.append(np.abs(end.variance / POWER - 1).max())
    assert errors[0] < 0.07 and errors[1] < 0.04 and errors[2] < 0.025  # of first order, but for the last three
    assert errors[2] < 0.7 * errors[0] or errors[0] < 0.01


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_pure_noise_becomes_the_data_but_for_what_the_last_time_step_still_shows(name: Name, kind: str) -> None:
    end = follow(kind, name, 500, pure_noise(kind, name, noise_power(kind)[-1]), injected_power(kind))
    alpha, _, gain = (value[-1] for value in shrink(kind))
    truth, power = noisy_data(kind), pure_noise(kind, name, noise_power(kind)[-1]).variance
    if name not in ANCESTRAL:
        slope = np.sqrt(POWER / truth.variance)
    elif kind == "adjusted":  # one shift for the whole chain, which is then no Markov chain: no such formula
        slope = None
    else:
        slope = gain  # of E[x0 | x_T]
    if slope is not None:
        expected = POWER + slope**2 * (power - truth.variance)
        np.testing.assert_allclose(end.variance, expected, rtol=0.04)
        missing = MEAN * (1 - slope[:, 0, 0] * alpha[0, 0, 0])
        np.testing.assert_allclose(end.mean[:, 0, 0] / np.sqrt(N), missing, atol=0.003)
    if kind not in ("plain", "pyramid"):  # whose start is too narrow: what offset noise is for
        np.testing.assert_allclose(end.variance, POWER, rtol=0.04)


@partial(jax.jit, static_argnames="prediction_type")
def run(
    start: jax.Array, injected: Any, alphas: jax.Array, gain: jax.Array, row: Any, mean_row: Any, prediction_type: str
) -> jax.Array:
    mean = jnp.asarray(MEAN, jnp.float32)[:, None, None]

    def denoiser(noisy: jax.Array, timestep: jax.Array) -> jax.Array:
        alpha, sigma = jnp.sqrt(alphas[timestep]), jnp.sqrt(1 - alphas[timestep])
        latent = mean + jnp.fft.irfft2(gain[timestep] * jnp.fft.rfft2(noisy - alpha * mean), s=(SIDE, SIDE))
        noise = (noisy - alpha * latent) / sigma
        return noise if prediction_type == "epsilon" else alpha * noise - sigma * latent

    process = VariancePreserving(alphas, prediction_type)
    inject = None if injected is None else lambda index: injected[index]
    return solve(denoiser, process, Table(**row), start, inject, mean_row and Table(**mean_row))


def sample(
    name: Name, kind: str, prediction_type: str, num_steps: int, start_kind: str, inject_kind: str, **changes: Any
) -> tuple[np.ndarray, np.ndarray]:
    """`COUNT` starts and ends, by the package's own noise and sampler."""
    row, mean_row = (
        table and {field.name: getattr(table, field.name) for field in fields(Table)}
        for table in tables(name, kind, num_steps, **changes)
    )
    start, injected = start_of(start_kind), injected_of(inject_kind, num_steps) if name in ANCESTRAL else None
    gain = shrink(kind)[2].astype(np.float32)
    alphas = process_of(kind).alphas_cumprod
    end = run(start, injected, alphas, gain, row, mean_row, prediction_type)
    return np.asarray(start, np.float64) * row["start"], np.asarray(end, np.float64)


@cache
def start_of(kind: str) -> jax.Array:
    keys = jax.random.split(jax.random.key(5), COUNT)
    return jax.jit(jax.vmap(lambda key: noise_of(kind).start(key, (CHANNELS, SIDE, SIDE))))(keys)


@cache
def injected_of(kind: str, num_steps: int) -> jax.Array:
    keys = jax.random.split(jax.random.key(6), num_steps * COUNT)
    noise = jax.jit(jax.vmap(lambda key: noise_of(kind).inject(key, (CHANNELS, SIDE, SIDE))))(keys)
    return noise.reshape(num_steps, COUNT, CHANNELS, SIDE, SIDE)


def bands(power: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
    """The mean of each band, a channel, and of how many modes."""
    return {
        band: ((power * TIMES)[:, inside].sum(1) / TIMES[inside].sum(), int(TIMES[inside].sum()))
        for band, inside in BANDS.items()
    }


def assert_moments(latents: np.ndarray, expected: Moments) -> None:
    """Of brightness and of two bands, within four standard errors."""
    brightness = latents.mean((2, 3))
    std = np.sqrt(expected.variance[:, 0, 0] / N)
    assert (np.abs(brightness.mean(0) - expected.mean[:, 0, 0] / np.sqrt(N)) < 4 * std / np.sqrt(COUNT)).all()
    centred = latents - (expected.mean[:, 0, 0] / np.sqrt(N))[:, None, None]
    power = (np.abs(np.fft.rfft2(centred)) ** 2 / N).mean(0)
    for band, ((measured, count), (wanted, _)) in zip(
        BANDS, zip(bands(power).values(), bands(expected.variance).values(), strict=True), strict=True
    ):
        assert (np.abs(measured / wanted - 1) < 4 * np.sqrt(2 / (COUNT * count))).all(), band


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_samples_have_the_moments_of_the_recurrence(name: Name, kind: str) -> None:
    expected = follow(kind, name, 6, pure_noise(kind, name, noise_power(kind)[-1]), injected_power(kind))
    for prediction_type in ("v_prediction",) if kind == "zero terminal snr" else ("epsilon", "v_prediction"):
        start, end = sample(name, kind, prediction_type, 6, kind, kind)
        assert_moments(end, expected)
        if name not in ANCESTRAL:  # one gain for all examples
            ratio = end.mean((2, 3)).std(0) / start.mean((2, 3)).std(0)
            gain = np.sqrt(expected.variance / pure_noise(kind, name, noise_power(kind)[-1]).variance)[:, 0, 0]
            np.testing.assert_allclose(ratio, gain, rtol=2e-4)
