"""What goes wrong when sampling and training do not share their noise; and noise that is a mixture of normal ones."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from offsetjax.diffusion.noise import Noise
from offsetjax.diffusion.sampler import ANCESTRAL, NAMES, Name, coefficients, solve
from offsetjax.diffusion.variance_preserving import variance_preserving
from tests.diffusion.test_exactness import (
    BRIGHTNESS_STD,
    COUNT,
    POWER,
    N,
    assert_moments,
    follow,
    injected_power,
    noise_power,
    noisy_data,
    pure_noise,
    sample,
)
from tests.tiny import quick_compilation

WHITE = np.ones_like(POWER)


@pytest.fixture(scope="module", autouse=True)
def _quickly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with quick_compilation(tmp_path_factory.getbasetemp()):
        yield


def brightness_std(variance: np.ndarray) -> np.ndarray:
    return np.sqrt(variance[:, 0, 0] / N)


@pytest.mark.parametrize("kind", ["offset", "channels", "pyramid with offset", "spectral", "adjusted"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ANCESTRAL])
def test_a_plain_start_shrinks_the_spread_of_brightness_as_predicted(name: Name, kind: str) -> None:
    """A deterministic sampler multiplies a start's deviation by √(P / V), whatever that deviation is."""
    end = follow(kind, name, 500, pure_noise(kind, name, WHITE), injected_power(kind))
    predicted = brightness_std(POWER / noisy_data(kind).variance)
    np.testing.assert_allclose(brightness_std(end.variance), predicted, rtol=0.02)
    assert (predicted < 0.3 * BRIGHTNESS_STD).all()

    expected = follow(kind, name, 6, pure_noise(kind, name, WHITE), injected_power(kind))
    _, latents = sample(name, kind, "v_prediction", 6, "plain", kind)
    assert_moments(latents, expected)
    assert (latents.mean((2, 3)).std(0) < 0.5 * BRIGHTNESS_STD).all()


@pytest.mark.parametrize("kind", ["offset", "channels", "pyramid with offset", "spectral"])
@pytest.mark.parametrize("name", ANCESTRAL)
def test_an_ancestral_sampler_that_injects_plain_noise_loses_the_spread_of_brightness(name: Name, kind: str) -> None:
    start = pure_noise(kind, name, noise_power(kind)[-1])
    matched, plain = (follow(kind, name, 500, start, power) for power in (injected_power(kind), WHITE))
    np.testing.assert_allclose(brightness_std(matched.variance), BRIGHTNESS_STD, rtol=0.02)
    assert (brightness_std(plain.variance) < 0.4 * BRIGHTNESS_STD).all()

    expected = follow(kind, name, 6, start, WHITE)
    _, latents = sample(name, kind, "epsilon", 6, kind, "plain")
    assert_moments(latents, expected)
    standard_error = BRIGHTNESS_STD / np.sqrt(2 * COUNT)
    coarse = brightness_std(follow(kind, name, 6, start, injected_power(kind)).variance)
    assert (coarse - latents.mean((2, 3)).std(0) > 4 * standard_error).all()


@pytest.mark.parametrize("name", NAMES)
def test_adjusted_noise_needs_a_table_of_the_mean_in_deterministic_samplers_and_in_them_alone(name: Name) -> None:
    start = noisy_data("adjusted")
    ordinary = brightness_std(follow("adjusted", name, 500, start, WHITE, own_mean=False).variance)
    if name in ANCESTRAL:
        np.testing.assert_allclose(ordinary, BRIGHTNESS_STD, rtol=0.02)
        injecting_more = follow("adjusted", name, 500, start, noise_power("adjusted")[-1])
        assert (brightness_std(injecting_more.variance) > 1.2 * BRIGHTNESS_STD).all()
        return
    own = brightness_std(follow("adjusted", name, 500, start, WHITE).variance)
    np.testing.assert_allclose(own, BRIGHTNESS_STD, rtol=0.02)
    # The ordinary step shrinks the noise as σ; that of this mean falls as σ ψ, faster: too much of it is left.
    assert (ordinary > 1.2 * BRIGHTNESS_STD).all()
    _, latents = sample(name, "adjusted", "epsilon", 6, "adjusted", "adjusted", own_mean=False)
    start = pure_noise("adjusted", name, noise_power("adjusted")[-1])
    expected = follow("adjusted", name, 6, start, WHITE, own_mean=False)
    assert_moments(latents, expected)


SIDE, STRENGTH, MEAN, STD = 8, 0.8, 0.1, 0.33
PIXELS = SIDE**2
MIXTURES = {
    "random strength": Noise("offset", np.array([STRENGTH]), random_strength=True),
    "probability": Noise("offset", np.array([STRENGTH]), probability=0.25),
}


def components(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Weights and variances of the normal distributions that the mean of the noise is a mixture of."""
    if kind == "probability":
        return np.array([0.75, 0.25]), 1 / PIXELS + np.array([0.0, STRENGTH**2])
    nodes, weights = np.polynomial.legendre.leggauss(48)
    return weights / 2, 1 / PIXELS + STRENGTH**2 * ((1 + nodes) / 2) ** 2


@pytest.mark.parametrize("start_noise", ["matched", "plain"])
@pytest.mark.parametrize("kind", MIXTURES)
def test_ddim_takes_the_quantiles_of_a_mixture_to_those_of_the_data(kind: str, start_noise: str) -> None:
    """In one dimension the exact flow keeps the order: brightness is the quantile of the data that x_T is of p(x_T)."""
    weights, variances = components(kind)
    process = variance_preserving(1000, 0.00085, 0.012, "v_prediction")
    log_weights, per_component = jnp.log(weights), jnp.asarray(variances)

    def denoiser(noisy: jax.Array, timestep: jax.Array) -> jax.Array:
        alpha, sigma = process.scales(timestep)
        mean = noisy.mean((2, 3), keepdims=True)
        centred = (mean - alpha * MEAN)[..., None]
        total = alpha**2 * STD**2 + sigma**2 * per_component
        share = jax.nn.softmax(log_weights - 0.5 * jnp.log(total) - 0.5 * centred**2 / total, -1)
        latent_mean = MEAN + (share * alpha * STD**2 / total * centred).sum(-1)
        rest = noisy - mean  # of white data with half the variance of the noise
        latent = latent_mean + rest * alpha * 0.5 / (0.5 * alpha**2 + sigma**2)
        return alpha * (noisy - alpha * latent) / sigma - sigma * latent

    noise = MIXTURES[kind] if start_noise == "matched" else Noise("offset", np.zeros(1))
    keys = jax.random.split(jax.random.key(8), 4096)
    start = jax.jit(jax.vmap(lambda key: noise.start(key, (1, SIDE, SIDE))))(keys)
    table = coefficients("ddim", process.grid("ddim", 200, "trailing"))
    latents = np.asarray(jax.jit(lambda start: solve(denoiser, process, table, start))(start), np.float64)

    kept = float(process.alphas_cumprod[-1])
    deviations = np.sqrt(kept * STD**2 + (1 - kept) * variances)
    place = np.asarray(start, np.float64).mean((1, 2, 3)) - np.sqrt(kept) * MEAN
    quantile = (weights * scipy.special.ndtr(place[:, None] / deviations)).sum(1)
    brightness = latents.mean((1, 2, 3))
    expected = STD * scipy.special.ndtri(quantile)
    np.testing.assert_allclose(brightness - MEAN, expected, rtol=0.02, atol=0.01 * STD)
    residual = latents - latents.mean((2, 3), keepdims=True)
    assert residual.var() == pytest.approx(0.5 * (1 - 1 / PIXELS), rel=0.03)

    standard_error = STD / np.sqrt(2 * len(keys))
    if start_noise == "plain":
        assert STD - brightness.std() > 20 * standard_error
        return
    assert abs(brightness.std() - STD) < 4 * standard_error + 0.01 * STD
    assert abs(brightness.mean() - MEAN) < 4 * STD / np.sqrt(len(keys)) + 0.03 * STD
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):  # 0.03: of the data's mean, √ᾱ_T of it is missing at the start
        error = np.sqrt(share * (1 - share) / len(keys))
        found = scipy.special.ndtr((np.quantile(brightness, share) - MEAN) / STD)
        assert abs(found - share) < 4 * error + 0.02, share
