r"""Samplers from T to 0, each a table of coefficients for one recurrence.

    x_s = A x_t + B x̂0(x_t) + C x̂0(x_previous) + D z,    s < t the next timestep of the grid, z the injected noise

With `α_t` and `σ_t` of the process (σ times the standard deviation of the noise, where that changes with time):

    ddim, euler                  A = σ_s/σ_t,  B = α_s - A α_t: the direction of the noise is kept
    dpmpp_2m                     the same, with x̂0 extrapolated from two steps in λ = log(α/σ)
    ddpm, euler_ancestral        the posterior of x_s given x_t and x̂0, with f = σ_t² - (α_t/α_s)² σ_s²:
                                 A = (α_t/α_s) (σ_s/σ_t)²,  B = α_s f / σ_t²,  D² = f (σ_s/σ_t)²

Which timesteps are visited, and with which α and σ, is the process's `grid`: under the variance-preserving one, DDIM
and Euler differ in where they end and in the scale they start from; Euler's ancestral form is DDPM in the same way.
Deterministic samplers are exact, for steps that are small enough, if `x_T` is drawn from
the noise of training; ancestral ones if they also inject that noise. Where the noise of a channel's mean has a power of
its own at every timestep (`adjusted` noise), the mean follows a table of its own; an ancestral sampler has no need of
it: given x0, the shift enters as a drift that grows with σ², and a bridge does not depend on its drift.

Sources: J. Song et al., arXiv 2010.02502 (DDIM); J. Ho et al., arXiv 2006.11239 (DDPM); T. Karras et al., arXiv
2206.00364 (Euler); C. Lu et al., arXiv 2211.01095 (DPM-Solver++); S. Lin et al., arXiv 2305.08891 (spacings, rescaled
guidance).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from offsetjax.diffusion.process import Grid, Process, Times, Timestep

Name = Literal["ddim", "ddpm", "euler", "euler_ancestral", "dpmpp_2m"]
NAMES: tuple[str, ...] = get_args(Name)
ANCESTRAL = ("ddpm", "euler_ancestral")
Spacing = Literal["trailing", "leading"]
Denoiser = Callable[[Float[Array, "b c h w"], Timestep], Float[Array, "b c h w"]]
Injection = Callable[[Int[Array, ""]], Float[Array, "b c h w"]]


@dataclass(frozen=True)
class Table:
    """One sampler's timesteps `[n]`, its coefficients `[n]` or, a channel, `[n, c]`, and the scale of its start."""

    timesteps: Times
    network_timesteps: Times  # what the network is told of them
    noisy: Float[np.ndarray, "n *c"]  # A
    latent: Float[np.ndarray, "n *c"]  # B
    previous_latent: Float[np.ndarray, "n *c"]  # C
    noise: Float[np.ndarray, "n *c"]  # D
    start: float


def coefficients(
    name: Name,
    grid: Grid,
    deviations: tuple[Float[np.ndarray, "n c"], Float[np.ndarray, "n c"]] | None = None,
) -> Table:
    """The table of a sampler over a process's grid, in float64.

    Args:
        deviations: the standard deviations of a mode's noise where each step begins and where it ends, where they
            change with time; only for the deterministic samplers.
    """
    alpha, alpha_after, sigma, sigma_after = grid.alpha, grid.alpha_after, grid.sigma, grid.sigma_after
    log_snr = grid.log_snr
    if deviations is not None:
        sigma, sigma_after = sigma[:, None] * deviations[0], sigma_after[:, None] * deviations[1]
        alpha, alpha_after = alpha[:, None], alpha_after[:, None]
        log_snr = log_snr[:, None] - np.log(deviations[0])

    none = np.zeros_like(sigma)
    table = partial(Table, grid.timesteps, grid.network_timesteps, start=grid.start)
    if name in ANCESTRAL:
        kept = alpha / alpha_after
        fresh = sigma**2 - (kept * sigma_after) ** 2  # the variance that is new between s and t
        shrink = (sigma_after / sigma) ** 2
        return table(
            noisy=kept * shrink,
            latent=alpha_after * fresh / sigma**2,
            previous_latent=none,
            noise=np.sqrt(shrink * fresh),
        )
    ratio = sigma_after / sigma
    latent = alpha_after - ratio * alpha
    extrapolation = none.copy()
    if name == "dpmpp_2m":
        width = np.diff(log_snr, axis=0)  # of the step that begins at i
        extrapolation[1:-1] = 0.5 * width[1:] / width[:-1]  # the first and the last step are of first order
    return table(
        noisy=ratio,
        latent=latent * (1.0 + extrapolation),
        previous_latent=-latent * extrapolation,
        noise=none,
    )


def solve(
    denoiser: Denoiser,
    process: Process,
    table: Table,
    start: Float[Array, "b c h w"],
    inject: Injection | None = None,
    mean_table: Table | None = None,
) -> Float[Array, "b c h w"]:
    """Follows a table from the noise `start` to latents, as one `lax.scan`.

    Args:
        denoiser: `(x_t, what the network is told of t) -> prediction` of the process's kind, guidance included.
        start: drawn from the noise of training.
        inject: the noise of step number i, for an ancestral sampler.
        mean_table: the coefficients of each channel's mean, where they differ from those of the rest.
    """

    def combine(row: tuple[Array, ...], noisy: Array, latent: Array, previous: Array) -> Array:
        a, b, c, _ = (value[..., None, None] for value in row)
        return a * noisy + b * latent + c * previous

    def step(carry: tuple[Array, Array], rows: tuple) -> tuple[tuple[Array, Array], None]:
        noisy, previous = carry
        index, timestep, network_timestep, row, mean_row = rows
        prediction = denoiser(noisy, network_timestep).astype(jnp.float32)
        latent, _ = process.to_latent_and_noise(noisy, prediction, timestep)
        after = combine(row, noisy, latent, previous)
        if mean_row is not None:
            means = [value.mean((2, 3), keepdims=True) for value in (noisy, latent, previous)]
            after += combine(mean_row, *means) - combine(row, *means)
        if inject is not None:
            after += row[3] * inject(index)
        return (after, latent), None

    def rows_of(table: Table) -> tuple[Array, ...]:
        values = (table.noisy, table.latent, table.previous_latent, table.noise)
        return tuple(jnp.asarray(value, jnp.float32) for value in values)

    rows = (
        jnp.arange(len(table.timesteps)),
        jnp.asarray(table.timesteps),
        jnp.asarray(table.network_timesteps),
        rows_of(table),
        rows_of(mean_table) if mean_table else None,
    )
    noisy = jnp.float32(table.start) * start
    return jax.lax.scan(step, (noisy, jnp.zeros_like(noisy)), rows)[0][0]


def guided(
    unconditional: Float[Array, "b c h w"], conditional: Float[Array, "b c h w"], scale: float, rescale: float
) -> Float[Array, "b c h w"]:
    """Classifier-free guidance (arXiv 2207.12598), its spread drawn back by `rescale` to the conditional one's.

    Args:
        rescale: φ of arXiv 2305.08891, 3.4: 0 is plain guidance, 0.7 the paper's value.
    """
    prediction = unconditional + scale * (conditional - unconditional)
    if rescale == 0:
        return prediction
    # PyTorch's std, and so the one of those who sample elsewhere, divides by n - 1; the ratio is the same.
    deviations = [value.std((1, 2, 3), keepdims=True) for value in (conditional, prediction)]
    return prediction * (rescale * deviations[0] / deviations[1] + 1.0 - rescale)
