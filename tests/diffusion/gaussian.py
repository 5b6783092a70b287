"""Grids and tables of a test's own, and the moments of a start, for `spread.follow`."""

from dataclasses import replace
from typing import Any

import numpy as np

from offsetjax.diffusion.process import Grid
from offsetjax.diffusion.sampler import Table
from offsetjax.diffusion.spread import Moments


def with_scale(table: Table, begin: Moments) -> Moments:
    """The moments of a start that is multiplied by what a table says."""
    return Moments(table.start * begin.mean, table.start**2 * begin.variance)


def flow_grid(sigma: Any) -> Grid:
    """A flow's grid through any values of σ = t above 0; it ends at 0."""
    sigma = np.asarray(sigma, np.float64)
    after = np.append(sigma[1:], 0.0)
    return Grid(
        sigma,
        network_timesteps=1000 * sigma,
        timesteps_after=after,
        alpha=1 - sigma,
        sigma=sigma,
        alpha_after=1 - after,
        sigma_after=after,
        log_snr=np.log(np.maximum(1 - sigma, 1e-9) / sigma),
        scale=np.ones_like(sigma),
    )


def exactly_told(table: Table) -> Table:
    """A flow's table whose network is told 1000 t to the last digit, where PyTorch's tells it whole numbers."""
    return replace(table, network_timesteps=1000 * table.timesteps)
