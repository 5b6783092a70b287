"""Offset noise has the covariance of its formula, and its bits depend on the key alone."""

import doctest
import importlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from offsetjax.config.schema import default_config
from offsetjax.diffusion.flow import Flow
from offsetjax.diffusion.noise import (
    Noise,
    make_noise,
    offset_noise,
)
from offsetjax.diffusion.process import make_process
from offsetjax.diffusion.spectrum import pyramid_spectrum
from offsetjax.diffusion.variance_preserving import variance_preserving
from offsetjax.parallel.sharding import mesh_of
from tests.tiny import quick_compilation


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


SIDE, CHANNELS, COUNT, N = 8, 2, 8192, 64
ADAPTIVE_LATENT = np.array([0.5, -1.5])  # the means of a latent's channels
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "offset": {"offset_strength": 0.5},
    "channels": {"channel_strengths": (0.5, 0.1)},
    "random": {"offset_strength": 0.5, "random_strength": True},
    "probability": {"offset_strength": 0.5, "probability": 0.25},
    "adaptive": {"offset_strength": 0.2, "adaptive_scale": 0.3},
    "adaptive, negative": {"offset_strength": 0.2, "adaptive_scale": -0.3},
    "pyramid": {"kind": "pyramid", "pyramid_discount": 0.5, "pyramid_levels": 5},
    "pyramid with offset": {"kind": "pyramid", "pyramid_discount": 0.5, "pyramid_levels": 5, "offset_strength": 0.5},
    "spectral": {"kind": "spectral", "spectrum": ("0.5 + 0.02 / (f + 0.05) ** 2", "where(f < 0.3, 3, 0.5)")},
    "adjusted": {"kind": "adjusted", "offset_strength": 0.5},
}
SHIFT_VARIANCE: dict[str, Any] = {  # of each channel: c², or what is known of its mean
    "offset": 0.25,
    "channels": np.array([0.25, 0.01]),
    "random": 0.25 / 3,  # E[u²] of u ~ U(0, 1)
    "probability": 0.25 * 0.25,
    "adaptive": (0.2 + 0.3 * np.abs(ADAPTIVE_LATENT)) ** 2,
    "adaptive, negative": np.array([0.05**2, 0.0]),  # 0.2 - 0.45 is below 0
    "pyramid with offset": 0.25,
}
RADIUS = np.hypot(*np.meshgrid(np.fft.fftfreq(SIDE), np.fft.fftfreq(SIDE), indexing="ij"))
KEPT = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


@pytest.fixture
def _quickly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with quick_compilation(tmp_path_factory.getbasetemp()):
        yield


def noise_of(kind: str, **changes: Any) -> Noise:
    config = default_config().noise
    config.update(KINDS[kind] | changes)
    return make_noise(config, variance_preserving(1000, 0.00085, 0.012, "epsilon"), downscale=8)


def expected_power(kind: str, timestep: int) -> np.ndarray:
    """`[channels, h, w]`: the whole plane of frequencies."""
    power = np.ones((CHANNELS, SIDE, SIDE))
    if "pyramid" in kind:  # checked by simulation below
        half = pyramid_spectrum(SIDE, SIDE, 0.5, 5)
        power = power * np.concatenate([half, half[:, 1 : SIDE // 2][:, ::-1]], 1)
    if kind == "spectral":
        power = np.stack([0.5 + 0.02 / (RADIUS + 0.05) ** 2, np.where(RADIUS < 0.3, 3.0, 0.5)])
    shift = SHIFT_VARIANCE.get(kind, 0.0)
    if kind == "adjusted":  # ψ² = SNR_T / SNR_t
        shift = 0.25 * (KEPT[-1] / (1 - KEPT[-1])) / (KEPT[timestep] / (1 - KEPT[timestep]))
    power[:, 0, 0] += shift * N
    return power


@pytest.mark.usefixtures("_quickly")
@pytest.mark.parametrize(("kind", "timestep"), [*((kind, 500) for kind in KINDS), ("adjusted", 99), ("adjusted", 999)])
def test_the_covariance_is_that_of_theory(kind: str, timestep: int) -> None:
    noise = noise_of(kind)
    latent = jnp.asarray(ADAPTIVE_LATENT, jnp.float32)[:, None, None] + jnp.zeros((CHANNELS, SIDE, SIDE))
    keys = jax.random.split(jax.random.key(1), COUNT)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: noise.draw(key, latent, jnp.int32(timestep))))(keys), np.float64)
    plane = np.fft.fft2(drawn)
    modes = ((plane.real - plane.imag) / SIDE).reshape(COUNT, -1)  # Hartley's: real, orthonormal
    expected = expected_power(kind, timestep).ravel()

    score = {}  # in standard errors, which are measured: a mixture has heavier tails than a normal distribution
    squares = modes**2
    score["variance"] = (squares.mean(0) - expected) / (squares.std(0) / np.sqrt(COUNT))
    score["mean"] = modes.mean(0) / np.sqrt(expected / COUNT)
    pairs = (modes.T @ modes / COUNT) / np.sqrt(squares.T @ squares) * np.sqrt(COUNT) * np.sqrt(COUNT)
    np.fill_diagonal(pairs, 0)
    assert max(np.abs(value).max() for value in score.values()) < 4.2  # the largest of 256
    assert np.abs(pairs).max() < 5  # the largest of 8,128
    assert noise.is_plain == (kind == "plain")
    if "adaptive" not in kind:  # whose power depends on the latents
        np.testing.assert_allclose(noise.variance(SIDE, SIDE, timestep), expected.mean(), rtol=1e-5)


@pytest.mark.usefixtures("_quickly")
@pytest.mark.parametrize("kind", ["random", "probability"])
def test_a_mixture_is_not_normal_and_its_channels_share_their_strength(kind: str) -> None:
    noise = noise_of(kind, offset_strength=5.0)
    keys = jax.random.split(jax.random.key(2), COUNT)
    means = np.asarray(jax.vmap(lambda key: noise.draw(key, jnp.zeros((2, SIDE, SIDE)), 0))(keys)).mean((2, 3))
    moment = {"random": 9 / 5, "probability": 4.0}[kind]  # E[c⁴] / E[c²]²
    kurtosis = (means**4).mean(0) / (means**2).mean(0) ** 2
    np.testing.assert_allclose(kurtosis, 3 * moment, rtol=0.15)
    shared = (means[:, 0] ** 2 * means[:, 1] ** 2).mean() / (means**2).mean(0).prod()
    assert shared == pytest.approx(moment, rel=0.15)


@pytest.mark.usefixtures("_quickly")
def test_adaptive_noise_starts_from_the_means_of_the_data() -> None:
    mean, deviation = (0.6, -0.2), (0.3, 0.5)
    noise = noise_of("adaptive", data_mean=mean, data_mean_std=deviation)
    keys = jax.random.split(jax.random.key(3), 4 * COUNT)
    start = jax.jit(jax.vmap(lambda key: noise.start(key, (2, SIDE, SIDE)).mean((1, 2))))(keys)
    means = np.random.default_rng(0).normal(mean, deviation, (400_000, 2))
    expected = ((0.2 + 0.3 * np.abs(means)) ** 2).mean(0) + 1 / N
    np.testing.assert_allclose(np.var(start, 0), expected, rtol=4 * np.sqrt(3 / len(keys)))
    np.testing.assert_allclose(noise.power(SIDE, SIDE)[:, 0, 0] / N, expected, rtol=0.01)


@pytest.mark.parametrize("size", [(8, 8), (7, 12), (64, 64)])
def test_an_offset_is_a_spectrum_too(size: tuple[int, int]) -> None:
    spectral = noise_of("spectral", spectrum=("where(f == 0, 1 + 0.01 * N, 1)",))
    np.testing.assert_allclose(spectral.power(*size), noise_of("offset", offset_strength=0.1).power(*size))
    expected = np.ones((size[0], size[1] // 2 + 1))
    expected[0, 0] = 1 + 0.1**2 * size[0] * size[1]  # N. Guttenberg 2023
    np.testing.assert_allclose(spectral.power(*size)[0], expected)


@pytest.mark.usefixtures("_quickly")
def test_pyramid_noise_of_one_row_is_a_formula_of_its_frequency() -> None:
    powers = noise_of("pyramid").power(1, 16)[0, 0]
    formula = f"interp(f, {tuple((np.arange(9) / 16).tolist())}, {tuple(powers.tolist())})"
    spectral = noise_of("spectral", spectrum=(formula,))
    key, latent = jax.random.key(4), jnp.zeros((2, 1, 16))
    np.testing.assert_allclose(spectral.draw(key, latent, 0), noise_of("pyramid").draw(key, latent, 0), atol=1e-5)


def test_a_batch_is_its_examples_one_by_one() -> None:
    keys, latents = jax.random.split(jax.random.key(2), 5), jnp.zeros((5, 4, 8, 8))
    batch = jax.vmap(offset_noise, in_axes=(0, 0, None))(keys, latents, 0.1)
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
        return jax.vmap(lambda key: offset_noise(key, jnp.zeros((4, 8, 8)), 0.1))(keys)

    noise = jax.jit(draw, out_shardings=NamedSharding(mesh, output))(sharded_keys)
    assert len(noise.sharding.device_set) == data * fsdp
    np.testing.assert_array_equal(noise, jax.jit(draw)(keys))


@pytest.mark.usefixtures("_quickly")
@pytest.mark.parametrize("kind", KINDS)
def test_an_examples_noise_depends_on_no_other_and_keeps_its_whole_offset(kind: str) -> None:
    """Kohya's pyramid divides by the deviation of a whole batch, which shrinks an offset that is there already."""
    noise, latents = noise_of(kind), jnp.full((6, CHANNELS, SIDE, SIDE), 0.5)
    draw = jax.vmap(lambda key, latent: noise.draw(key, latent, 700))
    keys = jax.random.split(jax.random.key(6), 6)
    batch = draw(keys, latents)
    for i in range(6):
        np.testing.assert_allclose(draw(keys[i : i + 1], latents[:1])[0], batch[i], atol=2e-6)
    if kind == "pyramid with offset":
        shift = np.asarray(batch - jax.vmap(lambda key: noise_of("pyramid").draw(key, latents[0], 0))(keys))
        plain = jax.vmap(lambda key: jax.random.normal(jax.random.split(key)[1], (CHANNELS, 1, 1)))(keys)
        np.testing.assert_allclose(shift, np.broadcast_to(0.5 * plain, shift.shape), atol=1e-5)


@pytest.mark.usefixtures("_quickly")
@pytest.mark.parametrize("kind", ["pyramid with offset", "adjusted", "channels"])
def test_a_reference_resolution_keeps_the_snr_of_the_mean_at_any_size(kind: str) -> None:
    noise = noise_of(kind, reference_resolution=128)  # latents of 16 x 16
    strengths = np.array(KINDS[kind].get("channel_strengths", (0.5,)))
    keys = jax.random.split(jax.random.key(7), COUNT)
    for size in ((16, 16), (8, 24), (5, 7)):
        pixels = size[0] * size[1]
        white = noise_of("pyramid").power(16, 16)[0, 0, 0] / 256 if "pyramid" in kind else 1 / 256
        expected = (white + strengths**2) * pixels  # the variance of the mean is what it is at 16 x 16
        if kind == "channels":  # whose second offset is less than the mean of so few pixels varies by itself
            expected = np.maximum(expected, 1.0)
        np.testing.assert_allclose(noise.power(*size)[:, 0, 0], expected)
        start = jax.jit(jax.vmap(lambda key, size=size: noise.start(key, (2, *size)).mean((1, 2))))(keys)
        measured = np.var(start, 0) * np.prod(size)
        np.testing.assert_allclose(measured, np.broadcast_to(expected, 2), rtol=4 * np.sqrt(2 / COUNT))
    unscaled = noise_of(kind)
    assert unscaled.power(16, 16)[0, 0, 0] > 2 * unscaled.power(8, 8)[0, 0, 0]


@settings(max_examples=40, deadline=None)
@given(
    process=st.sampled_from(["variance_preserving", "flow"]),
    rule=st.sampled_from(["fixed", "resolution", "tokens"]),
    strength=st.floats(0.1, 0.5),
    side=st.integers(256, 2048),
    reference=st.integers(256, 2048),
    mixture=st.sampled_from([{}, {"random_strength": True}, {"probability": 0.4}]),
)
def test_brightness_is_decided_where_it_was_at_every_size(
    process: str, rule: str, strength: float, side: int, reference: int, mixture: dict[str, Any]
) -> None:
    """The SNR of the mean at each share of the timesteps, as they are shifted, and so its t*: any size, any process."""
    config = default_config()
    config.schedule.process = process
    if process == "flow":
        config.schedule.update(shift_rule=rule, shift_resolution=512 if rule == "resolution" else 0)
    config.noise.update(offset_strength=strength, reference_resolution=8 * (reference // 8), **mixture)
    made = make_process(config.schedule)
    noise = make_noise(config.noise, made, downscale=8)
    variances, ratios = [], []
    for size in (reference // 8, side // 8):
        variances.append(noise.power(size, size)[0, 0, 0] / size**2)  # of the mean
        ratios.append(made.shift_at(size**2))  # σ/α at each share of the timesteps goes with it
    if noise.strengths_at(side // 8, side // 8)[0] == 0:  # so large a shift hides the mean by itself
        assert variances[0] * ratios[0] ** 2 <= variances[1] * ratios[1] ** 2
        return
    assert variances[1] * ratios[1] ** 2 == pytest.approx(variances[0] * ratios[0] ** 2, rel=1e-9)
    effective = noise.strengths_at(side // 8, side // 8) * np.sqrt(mixture.get("probability", 1.0))
    effective *= np.sqrt(1 / 3) if mixture.get("random_strength") else 1.0
    np.testing.assert_allclose(noise.strengths_for(effective, side // 8, side // 8), strength, rtol=1e-6)


def test_a_fixed_strength_hides_the_mean_equally_on_one_schedule_and_c_root_n_does_not() -> None:
    noise = noise_of("offset", offset_strength=0.1, reference_resolution=512)
    assert noise.strengths_at(128, 128)[0] == pytest.approx(np.sqrt(0.01 + 1 / 4096 - 1 / 16_384))
    snr = {c: 1 / (1 / 16_384 + c**2) * (1 / 4096 + 0.01) for c in (0.1, 0.05)}  # relative to .1 at 512 px
    assert snr[0.1] == pytest.approx(1.0, rel=0.02) and snr[0.05] == pytest.approx(4.0, rel=0.02)
    config = default_config().noise
    config.update(offset_strength=0.1, reference_resolution=512)
    shifted = make_noise(config, Flow(shift_rule="resolution", reference_pixels=4096), downscale=8)
    assert shifted.strengths_at(128, 128)[0] * 128 == pytest.approx(0.1 * 64)


def test_adjusted_noise_is_that_of_a_chain_whose_shift_enters_step_by_step() -> None:
    # T. Kutsuna, arXiv 2412.03134: x_t = √α_t (x_{t-1} + γ_t ξ) + √(1-α_t) ε_t, with the γ for which φ is ψ.
    before = np.concatenate([[1.0], KEPT[:-1]])
    gamma = np.sqrt(before) * (1 / KEPT - 1 / before) * np.sqrt(KEPT[-1] / (1 - KEPT[-1]))
    psi = np.sqrt(KEPT) * np.cumsum(gamma / np.sqrt(before)) / np.sqrt(1 - KEPT)  # of the shift in x_t
    phi = gamma * np.sqrt(KEPT / before) * np.sqrt(1 - KEPT) / (1 - KEPT / before)  # of the shift in the target
    np.testing.assert_allclose(psi, phi, rtol=1e-9)
    process = variance_preserving(1000, 0.00085, 0.012, "epsilon")
    np.testing.assert_allclose(psi, process.growth(np.arange(1000))[0], rtol=2e-4)  # of ᾱ in float32
    assert psi[499] == pytest.approx(0.1104, abs=5e-5) and psi[899] == pytest.approx(0.568, abs=5e-4)
    assert psi[-1] == pytest.approx(1.0)

    generator, count, strength = np.random.default_rng(0), 20_000, 0.5
    shift = generator.standard_normal(count)
    x, noise = np.full(count, 0.7), noise_of("adjusted")
    alphas = KEPT / np.concatenate([[1.0], KEPT[:-1]])
    for t, alpha in enumerate(alphas):  # the mean of a channel, whose plain noise has the variance 1 / N
        fresh = generator.standard_normal(count) / np.sqrt(N)
        x = np.sqrt(alpha) * (x + gamma[t] * strength * shift) + np.sqrt(1 - alpha) * fresh
        if t in (99, 499, 899, 999):
            variance = (1 - KEPT[t]) * noise.power(SIDE, SIDE, t)[0, 0, 0] / N
            assert x.mean() == pytest.approx(np.sqrt(KEPT[t]) * 0.7, abs=4 * np.sqrt(variance / count))
            assert x.var() == pytest.approx(variance, rel=4 * np.sqrt(2 / count))
            slope = (x * shift).mean()
            error = 4 * np.sqrt((variance + 0.49 + slope**2) / count)
            assert slope == pytest.approx(np.sqrt(1 - KEPT[t]) * psi[t] * strength, abs=error)


@pytest.mark.usefixtures("_quickly")
@pytest.mark.parametrize("kind", ["offset", "adjusted", "random", "probability"])
def test_strength_zero_of_every_kind_is_plain_noise_bit_for_bit(kind: str) -> None:
    noise, key, shape = noise_of(kind, offset_strength=0.0), jax.random.key(9), (CHANNELS, SIDE, SIDE)
    plain = jax.random.normal(jax.random.split(key)[0], shape)
    np.testing.assert_array_equal(noise.draw(key, jnp.ones(shape), 300), plain)
    np.testing.assert_array_equal(noise.start(key, shape), plain)
    np.testing.assert_array_equal(noise.inject(key, shape), plain)
    np.testing.assert_array_equal(offset_noise(key, jnp.ones(shape), 0.0), plain)


@pytest.mark.parametrize("kind", ["channels", "probability", "adaptive", "pyramid with offset", "spectral", "adjusted"])
def test_the_bits_of_no_kind_depend_on_the_mesh(kind: str) -> None:
    noise, keys = noise_of(kind), jax.random.split(jax.random.key(10), 8)

    def draw(keys: jax.Array) -> jax.Array:
        return jax.vmap(lambda key: noise.draw(key, jnp.full((2, SIDE, SIDE), 0.5), 600))(keys)

    mesh = mesh_of(data=2, fsdp=4)
    alone = jax.jit(draw)(keys)
    for place in (P(("data", "fsdp")), P(None, None, None, ("data", "fsdp"))):  # XLA's FFT on CPUs splits no rows
        sharded = jax.jit(draw, out_shardings=NamedSharding(mesh, place))
        noise_there = sharded(jax.device_put(keys, NamedSharding(mesh, P(("data", "fsdp")))))
        np.testing.assert_array_equal(noise_there, alone)


@pytest.mark.parametrize("name", ["noise", "process", "variance_preserving", "loss", "sampler", "spectrum"])
def test_the_examples_in_the_docstrings_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"offsetjax.diffusion.{name}"))
    assert result.failed == 0
    assert result.attempted or name != "noise"
