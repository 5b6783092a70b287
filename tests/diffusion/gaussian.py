"""What a sampler's table does to the mean and the variance of normal data, whose best guess of x0 is linear a mode."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from offsetjax.diffusion.process import Grid
from offsetjax.diffusion.sampler import Table


@dataclass(frozen=True)
class Moments:
    """Mean and variance of modes, in units in which white noise has variance 1."""

    mean: Any
    variance: Any


def follow(table: Table, guesses: Any, begin: Moments, injected: Any = 0.0) -> Moments:
    """The moments at the end of a table.

    Args:
        table: its rows may have an axis for the modes: `[n, 5, modes]`, `[n, modes]`.
        guesses: of each evaluation, `(m, k, c)`: the guess of x0 is `m + k (x - c)`, each for all modes.
        injected: the power of the noise that is injected, of each mode.
    """
    modes = np.broadcast(begin.mean, begin.variance).shape
    mean = np.zeros((4, *modes))  # of x, of the state beside it, of the last two guesses
    covariance = np.zeros((4, 4, *modes))
    mean[:2], covariance[:2, :2] = begin.mean, begin.variance
    for row, kept, noise, (m, k, c) in zip(table.noisy, table.kept, table.noise, guesses, strict=True):
        transition, constant = np.zeros((4, 4, *modes)), np.zeros((4, *modes))
        for i, weights in enumerate((row, kept)):
            x, b, latent, last, before = (np.broadcast_to(weight, modes) for weight in weights)
            transition[i] = x + k * latent, b, last, before
            constant[i] = latent * (m - k * c)
        if not np.any(kept):  # it then stays as it is
            transition[1, 0] = 0.0
            transition[1, 1] = 1.0
        transition[2, 0], constant[2] = k, m - k * c
        transition[3, 2] = 1.0
        mean = np.einsum("ij...,j...->i...", transition, mean) + constant
        covariance = np.einsum("ij...,jk...,lk...->il...", transition, covariance, transition)
        covariance[0, 0] += noise**2 * injected
    return Moments(mean[0], covariance[0, 0])


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
