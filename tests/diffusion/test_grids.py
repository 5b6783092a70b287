"""Time grids, shifts and densities, for any setting: in order, from end to end, and each the inverse of the other."""

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from offsetjax.diffusion.density import KINDS, Density, shifted
from offsetjax.diffusion.flow import Flow
from offsetjax.diffusion.sampler import NAMES
from offsetjax.diffusion.variance_preserving import timestep_grid, variance_preserving
from tests.properties import checked, each_count

SHIFTS = st.floats(0.05, 20)
TIMES = np.linspace(0, 1, 65)


@each_count
def test_shifts_compose_invert_and_keep_the_ends_and_the_order(count: int) -> None:
    @checked(count)
    @given(SHIFTS, SHIFTS)
    def holds(one: float, other: float) -> None:
        moved = shifted(TIMES, one)
        assert moved[0] == 0 and moved[-1] == pytest.approx(1, abs=1e-15) and (np.diff(moved) > 0).all()
        np.testing.assert_allclose(shifted(moved, other), shifted(TIMES, one * other), rtol=1e-12)
        np.testing.assert_allclose(shifted(moved, 1 / one), TIMES, atol=1e-12)
        np.testing.assert_allclose(moved[1:-1] / (1 - moved[1:-1]), one * TIMES[1:-1] / (1 - TIMES[1:-1]), rtol=1e-9)

    holds()


DENSITIES = st.builds(
    Density,
    kind=st.sampled_from(KINDS),
    mean=st.floats(-2, 2),
    std=st.floats(0.3, 2),
    scale=st.floats(-1, 1.75),
    least=st.floats(0, 0.4),
    most=st.floats(0.6, 1),
)


@each_count
def test_a_density_s_quantiles_rise_within_its_range_and_its_shares_are_their_inverse(count: int) -> None:
    @checked(count)
    @given(DENSITIES, SHIFTS)
    def holds(density: Density, shift: float) -> None:
        u = np.linspace(0.01, 0.99, 33, dtype=np.float32)
        t = np.asarray(density.quantile(u, shift), np.float64)
        assert (np.diff(t) >= 0).all(), "the order is another"
        assert density.least - 1e-6 <= t[0] < t[-1] <= density.most + 1e-6
        shares = np.array([density.share_above(float(each), shift) for each in t])
        # A share is read off t, which float32 holds to 6e-8: as exactly as t tells u.
        slack = 2e-3 + 3e-7 / np.maximum(np.gradient(t, u), 1e-9)
        assert (np.abs(shares - (1 - u)) <= slack).all()
        assert (density.share_above(density.least - 0.01, shift), density.share_above(density.most, shift)) == (1, 0)

    holds()


STEPS = {
    "num_steps": st.integers(1, 250),
    "name": st.sampled_from(NAMES),
    "spacing": st.sampled_from(["trailing", "leading"]),
}


@each_count
def test_a_grid_of_whole_timesteps_falls_within_the_schedule(count: int) -> None:
    @checked(count)
    @given(num_train_timesteps=st.integers(252, 2000), **STEPS)
    def holds(num_train_timesteps: int, num_steps: int, name: Any, spacing: str) -> None:
        visited = timestep_grid(num_train_timesteps, num_steps, spacing, name)
        assert len(visited) == num_steps and (np.diff(visited) < 0).all()
        assert visited[-1] >= 0 and visited[0] < num_train_timesteps
        if spacing == "trailing":
            assert visited[0] == num_train_timesteps - 1

    holds()


@each_count
def test_the_present_process_s_grid_goes_from_noise_to_the_data(count: int) -> None:
    process = variance_preserving(1000, 0.00085, 0.012, "epsilon")

    @checked(count)
    @given(**STEPS)
    def holds(num_steps: int, name: Any, spacing: str) -> None:
        grid = process.grid(name, num_steps, spacing)
        np.testing.assert_allclose(grid.alpha**2 + grid.sigma**2, 1, atol=1e-6)
        np.testing.assert_allclose(grid.alpha_after**2 + grid.sigma_after**2, 1, atol=1e-6)
        assert (np.diff(grid.sigma) < 0).all() and (np.diff(grid.log_snr) > 0).all()
        assert (grid.sigma_after < grid.sigma).all()
        if name != "ddim":  # which counts back by itself
            np.testing.assert_allclose(grid.sigma_after[:-1], grid.sigma[1:], rtol=1e-6)

    holds()


@each_count
def test_a_flow_s_grid_goes_from_noise_to_the_data(count: int) -> None:
    @checked(count)
    @given(shift=SHIFTS, **STEPS)
    @example(shift=0.41278085507489376, num_steps=1, name="euler", spacing="trailing")  # sigma was above 1
    def holds(num_steps: int, name: Any, spacing: str, shift: float) -> None:
        grid = Flow().grid(name, num_steps, spacing, shift)
        assert len(grid.timesteps) == num_steps
        np.testing.assert_allclose(grid.alpha + grid.sigma, 1, atol=1e-12)
        assert (np.diff(grid.sigma) < 0).all() and grid.sigma[-1] > 0 and grid.sigma[0] <= 1
        # Each step ends where the next begins, and the last at the data.
        np.testing.assert_allclose(grid.sigma_after[:-1], grid.sigma[1:], rtol=1e-12)
        assert grid.sigma_after[-1] == 0 and grid.alpha_after[-1] == 1
        assert np.isfinite(grid.log_snr).all() and (np.diff(grid.log_snr) > 0).all()

    holds()
