"""The flow's process against PyTorch diffusers, and against the algebra of what a grid returns of the data's spread."""

from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offsetjax.diffusion.density import Density, shifted
from offsetjax.diffusion.flow import Flow
from offsetjax.diffusion.loss import flow_weight, min_snr_weight
from offsetjax.diffusion.process import Grid, add_noise, mode_snr
from offsetjax.diffusion.sampler import ANCESTRAL, NAMES, Name, coefficients, solve
from offsetjax.diffusion.spread import Moments, follow
from tests.diffusion.gaussian import exactly_told, flow_grid

SHAPE = (2, 4, 6, 6)
GENERATOR = np.random.default_rng(0)
MIX = (0.4 * GENERATOR.standard_normal((4, 4))).astype(np.float32)
DRIFT = GENERATOR.standard_normal((4, 1, 1)).astype(np.float32)
START = GENERATOR.standard_normal(SHAPE).astype(np.float32)
INJECTED = GENERATOR.standard_normal((50, *SHAPE)).astype(np.float32)


def our_path(name: Name, grid: Grid) -> list[np.ndarray]:
    """All `x_t` of a network that mixes channels and drifts with time, the start and the end included."""
    path = []

    def denoiser(noisy: jax.Array, told: jax.Array) -> jax.Array:
        path.append(np.asarray(noisy))
        return jnp.einsum("oc,bchw->bohw", MIX, noisy) + DRIFT * told / 1000

    inject = (lambda index: jnp.asarray(INJECTED[int(index)])) if name in ANCESTRAL else None
    with jax.disable_jit():  # the scan is then a loop, in which the values can be seen
        end = solve(denoiser, Flow(), coefficients(name, grid), jnp.asarray(START), inject)
    return [*path, np.asarray(end)]


def their_path(scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The same, by a PyTorch scheduler whose timesteps are set."""
    sample, path = torch.from_numpy(START), []
    for number, told in enumerate(scheduler.timesteps):
        path.append(sample.numpy())
        drawn = torch.from_numpy(INJECTED[number % len(INJECTED)])
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_dpmsolver_multistep.randn_tensor", lambda *_, drawn=drawn, **__: drawn
        )
        prediction = (
            torch.einsum("oc,bchw->bohw", torch.from_numpy(MIX), sample) + torch.from_numpy(DRIFT) * told / 1000
        )
        sample = scheduler.step(prediction, told, sample, return_dict=False)[0].float()
    return [*path, sample.numpy()]


def farthest(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    assert len(ours) == len(theirs)
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 28, 50])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp_2m", "unipc"])
def test_every_step_is_that_of_the_scheduler_that_an_export_writes(
    name: Name, num_steps: int, shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Flow().scheduler(name, "trailing", shift)
    assert written["prediction_type"] == "flow_prediction" and written["use_flow_sigmas"]
    scheduler = getattr(diffusers, written["_class_name"]).from_config(written)
    assert not set(written) - set(scheduler.config) - {"_class_name"}
    scheduler.set_timesteps(num_steps)
    grid = Flow().grid(name, num_steps, "trailing", shift)
    np.testing.assert_array_equal(grid.network_timesteps, scheduler.timesteps)
    assert farthest(our_path(name, grid), their_path(scheduler, monkeypatch)) < 2e-5


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 28])
def test_euler_is_that_of_flow_matching_pipelines(
    num_steps: int, shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps))  # as SD 3's and FLUX's hand them in
    grid = Flow().grid("euler", num_steps, "trailing", shift)
    np.testing.assert_allclose(grid.network_timesteps, scheduler.timesteps, rtol=1e-6)
    assert farthest(our_path("euler", grid), their_path(scheduler, monkeypatch)) < 2e-5
    # And on the grid that the scheduler has by itself, which goes through its shift twice.
    scheduler.set_timesteps(num_steps)
    own = flow_grid(scheduler.sigmas[:-1].double())
    assert farthest(our_path("euler", own), their_path(scheduler, monkeypatch)) < 2e-5


@pytest.mark.parametrize("num_steps", [1, 2, 7, 28])
def test_heun_is_that_of_flow_matching(num_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(num_steps)
    visited = np.unique(scheduler.sigmas[:-1].double())[::-1]
    assert len(visited) == num_steps
    assert farthest(our_path("heun", flow_grid(visited)), their_path(scheduler, monkeypatch)) < 2e-5


# Share of the data's spread of brightness that Euler returns: mean of standard deviation .6, N = 16,384; with an offset
# of 0, .05, .1 and .2, and of .1 from a plain start.
RETURNED = {
    (20, 1.0): (0.24, 0.77, 0.86, 0.91, 0.07),
    (28, 1.0): (0.33, 0.83, 0.90, 0.94, 0.07),
    (28, 3.0): (0.67, 0.93, 0.95, 0.96, 0.07),
    (50, 1.0): (0.52, 0.90, 0.94, 0.96, 0.07),
    (50, 3.0): (0.81, 0.96, 0.97, 0.97, 0.08),
    (100, 3.0): (0.90, 0.98, 0.99, 0.99, 0.08),
}


@pytest.mark.parametrize(("num_steps", "shift"), RETURNED)
def test_the_spread_that_a_grid_returns_is_that_of_the_algebra(num_steps: int, shift: float) -> None:
    pixels = 16_384
    power = jnp.asarray([1 + strength**2 * pixels for strength in (0, 0.05, 0.1, 0.2, 0.1)])[:, None, None, None]
    data = 0.36 * pixels
    begin = jnp.sqrt(power).at[-1].set(1.0)

    def denoiser(x: jax.Array, told: jax.Array) -> jax.Array:
        t = told / 1000
        return x * (t * power - (1 - t) * data) / ((1 - t) ** 2 * data + t**2 * power)

    table = coefficients("euler", Flow().grid("euler", num_steps, "trailing", shift))
    returned = np.abs(solve(denoiser, Flow(), table, begin).ravel()) / np.sqrt(data)
    np.testing.assert_allclose(returned, RETURNED[num_steps, shift], atol=0.0051)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ANCESTRAL])
@pytest.mark.parametrize(("pixels", "share"), [(4096, 0.15), (16_384, 0.08)])
def test_a_plain_start_collapses_to_the_share_of_the_formula(name: Name, pixels: int, share: float) -> None:
    power, data = 1 + 0.01 * pixels, 0.36 * pixels
    assert np.sqrt((1 / pixels) / (1 / pixels + 0.01)) == pytest.approx(share, abs=0.005)
    for start, expected in ((1.0, share), (power, 1.0)):
        end = follow_mode(name, Flow().grid(name, 1000, "trailing", 3.0), data, power, start)
        assert np.sqrt(end.variance / data) == pytest.approx(expected, abs=0.006)


def follow_mode(name: Name, grid: Grid, data: float, power: float, start: float | None = None) -> Moments:
    """The moments of one mode at the end, from the noise of training or another power of the start."""
    table = coefficients(name, grid)
    t = table.timesteps
    gain = (1 - t) * data / ((1 - t) ** 2 * data + t**2 * power)
    begin = Moments(0.0, power if start is None else start)
    return follow(table, [(0.0, k, 0.0) for k in gain], begin, injected=power)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from([name for name in NAMES if name != "heun"]),  # which takes means, in coordinates of its own
    num_steps=st.integers(1, 40),
    shift=st.floats(0.3, 6),
    data=st.floats(0.01, 1e4),
    power=st.floats(0.05, 500),
)
def test_a_mode_with_noise_of_power_p_behaves_as_with_a_shift_by_root_p(
    name: Name, num_steps: int, shift: float, data: float, power: float
) -> None:
    sigma = Flow().grid(name, num_steps, "trailing", shift).sigma
    sigma = np.minimum(sigma, 1 - 1e-3)
    coloured = follow_mode(name, flow_grid(sigma), data, power)
    # Of x_t divided by (1-t) + √P t, which is 1 at the end, and √P at t = 1.
    start = power / ((1 - sigma[0]) + np.sqrt(power) * sigma[0]) ** 2
    plain = follow_mode(name, flow_grid(shifted(sigma, np.sqrt(power))), data, 1.0, start)
    assert coloured.variance == pytest.approx(plain.variance, rel=1e-6)
    # It is as legible at each timestep as with plain noise at the shifted one.
    snr = mode_snr(np.full(num_steps, data), np.full(num_steps, power), Flow().snr(sigma))
    np.testing.assert_allclose(snr, data * Flow().snr(shifted(sigma, np.sqrt(power))), rtol=1e-9)
    crossing = 1 / (1 + np.sqrt(power / data))
    assert data / power * Flow().snr(crossing) == pytest.approx(1.0)


def test_time_dependent_noise_brings_its_derivative_into_the_target() -> None:
    key = jax.random.key(0)
    latent, white, shift = (jax.random.normal(k, (4, 3, 5)) for k in jax.random.split(key, 3))
    process = Flow()

    def noise(t: jax.Array) -> jax.Array:
        return white + process.growth(t)[0] * shift

    for t in (0.1, 0.5, 0.9):
        t = jnp.float32(t)
        path = jax.jvp(lambda t: add_noise(process, latent, noise(t), t), (t,), (jnp.float32(1.0),))
        rate = process.growth(t)[1] * shift
        np.testing.assert_allclose(process.target(latent, noise(t), rate, t), path[1], atol=1e-5)
    assert process.growth(process.last_timestep)[0] == 1


def test_a_perfect_prediction_gives_back_the_latent_and_the_noise() -> None:
    process, keys = Flow(), jax.random.split(jax.random.key(3), 64)

    def example(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        a, b, c = jax.random.split(key, 3)
        t, latent, noise = jax.random.uniform(a), jax.random.normal(b, (4, 3)), jax.random.normal(c, (4, 3))
        noisy = add_noise(process, latent, noise, t)
        found = process.to_latent_and_noise(noisy, process.target(latent, noise, 0.0, t), t)
        return jnp.abs(found[0] - latent).max(), jnp.abs(found[1] - noise).max()

    assert max(float(error.max()) for error in jax.vmap(example)(keys)) < 1e-5


def test_min_snr_is_the_weight_of_x0() -> None:
    process = Flow()
    for t in (0.05, 0.3, 0.5, 0.9, 0.99):
        t = jnp.float32(t)
        expected = min(((1 - t) / t) ** 2, 5.0) * t**2
        assert float(min_snr_weight(process, t, 5.0)) == pytest.approx(float(expected), rel=1e-5)
    assert float(min_snr_weight(process, jnp.float32(0.0), 5.0)) == 0.0


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap", "none"])
def test_loss_weights_are_those_of_diffusers(scheme: str) -> None:
    sigmas = torch.linspace(0.01, 1, 20)
    theirs = diffusers.training_utils.compute_loss_weighting_for_sd3(scheme, sigmas)
    ours = jax.vmap(lambda t: flow_weight(Flow(), t, scheme))(jnp.asarray(sigmas.numpy()))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


DENSITIES = {
    "uniform": Density(),
    "logit_normal": Density("logit_normal", mean=0.5, std=0.8),
    "mode": Density("mode", scale=1.29),
    "mode at the ends": Density("mode", scale=-0.7),
    "cosmap": Density("cosmap"),
    "range": Density("logit_normal", least=0.3, most=0.9),
}


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", DENSITIES)
def test_draws_have_the_density_that_is_named(name: str, shift: float) -> None:
    density, count = DENSITIES[name], 20_000
    keys = jax.random.split(jax.random.key(1), count)
    drawn = np.asarray(jax.vmap(lambda key: density.draw(key, jnp.int32(0), shift))(keys), np.float64)
    assert drawn.min() >= density.least and drawn.max() <= density.most
    for t in (0.05, 0.2, 0.5, 0.7, 0.95):
        share = density.share_above(t, shift)
        assert (drawn > t).mean() == pytest.approx(share, abs=4 * np.sqrt(0.25 / count))


def test_densities_are_those_of_the_paper() -> None:
    """P. Esser et al., arXiv 2403.03206: f_mode(u; s) = 1 - u - s (cos²(πu/2) - 1 + u), cosmap 2 / (π - 2πt + 2πt²)."""
    u = np.linspace(0.01, 0.99, 21)
    for scale in (-1.0, 0.5, 1.75):
        paper = 1 - (1 - u) - scale * (np.cos(0.5 * np.pi * (1 - u)) ** 2 - 1 + (1 - u))
        np.testing.assert_allclose(Density("mode", scale=scale).quantile(jnp.asarray(u)), paper, atol=1e-6)
    t, step = 0.37, 1e-5
    slope = (Density("cosmap").share_above(t - step) - Density("cosmap").share_above(t + step)) / (2 * step)
    assert slope == pytest.approx(2 / (np.pi - 2 * np.pi * t + 2 * np.pi * t**2), rel=1e-5)
    # PyTorch's training scripts index a grid that descends: what they call m = .5 leans away from noise, ours to it.
    torch.manual_seed(0)
    theirs = diffusers.training_utils.compute_density_for_timestep_sampling("logit_normal", 20_000, 0.5, 1.0).median()
    assert 1 - theirs.item() == pytest.approx(0.378, abs=0.01)
    assert float(Density("logit_normal", mean=0.5).quantile(jnp.float32(0.5))) == pytest.approx(0.622, abs=0.001)


@pytest.mark.parametrize(
    ("offset", "pixels", "spread", "uniform", "logit_normal", "with_shift_3"),
    [
        (0.0, 4096, 0.975, 0.025, 0.00013, 0.0054),
        (0.1, 4096, 0.856, 0.14, 0.038, 0.25),
        (0.0, 16_384, 0.987, 0.013, 0.000007, 0.0006),
        (0.05, 16_384, 0.922, 0.078, 0.007, 0.085),
        (0.1, 16_384, 0.857, 0.14, 0.037, 0.25),
    ],
)
def test_the_share_of_training_where_brightness_is_decided(
    offset: float, pixels: int, spread: float, uniform: float, logit_normal: float, with_shift_3: float
) -> None:
    crossing = 1 / (1 + np.sqrt((1 + offset**2 * pixels) / (0.36 * pixels)))
    assert crossing == pytest.approx(spread, abs=6e-4)
    shares = [Density().share_above(crossing)]
    shares += [Density("logit_normal").share_above(crossing, shift) for shift in (1.0, 3.0)]
    np.testing.assert_allclose(shares, (uniform, logit_normal, with_shift_3), rtol=0.1)


def test_stratified_draws_have_one_example_in_each_stratum() -> None:
    density = Density(strata=64)
    keys = jax.random.split(jax.random.key(2), 64)
    drawn = jax.vmap(density.draw)(keys, jnp.arange(64))
    np.testing.assert_array_equal(np.floor(np.asarray(drawn) * 64), np.arange(64))
    logit = jax.vmap(Density("logit_normal", strata=64).draw)(keys, jnp.arange(64))
    assert np.median(logit) == pytest.approx(0.5, abs=0.02)


def test_shifts_follow_the_resolution_or_the_number_of_tokens() -> None:
    assert Flow(shift=3.0).shift_at(4096) == Flow(shift=3.0).shift_at(16_384) == 3.0
    by_resolution = Flow(shift=1.5, shift_rule="resolution", reference_pixels=4096)
    assert by_resolution.shift_at(4096) == 1.5 and by_resolution.shift_at(16_384) == pytest.approx(3.0)
    by_tokens = Flow(shift_rule="tokens")  # FLUX: 0.5 at 256 tokens, 1.15 at 4,096
    assert by_tokens.shift_at(1024) == pytest.approx(np.exp(0.5))
    assert by_tokens.shift_at(16_384) == pytest.approx(np.exp(1.15))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    theirs = scheduler.time_shift(1.15, 1.0, torch.linspace(0.1, 1, 10))
    np.testing.assert_allclose(shifted(np.linspace(0.1, 1, 10), by_tokens.shift_at(16_384)), theirs, rtol=1e-6)


def test_the_network_is_told_a_thousand_times_t() -> None:
    table = coefficients("dpmpp_2m", Flow().grid("dpmpp_2m", 7, "trailing", 1.0))
    assert (table.network_timesteps == np.floor(1000 * table.timesteps)).all()
    np.testing.assert_allclose(exactly_told(table).network_timesteps, Flow().network_timestep(table.timesteps))
    assert float(Flow().timestep_at(jnp.int32(900))) == pytest.approx(0.9)
