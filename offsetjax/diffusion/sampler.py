r"""Samplers from noise to data, each a table of coefficients for one recurrence.

    x_s = A x_t + E b + B x̂0(x_t) + C x̂0' + C' x̂0'' + D z,      b' = the same with coefficients of its own

s < t is the next timestep of the grid, x̂0' and x̂0'' the last two guesses of x0, z the injected noise, and b a state
that a sampler may keep beside x. With `α_t` and `σ_t` of the process (σ times the standard deviation of the noise,
where that changes with time):

    ddim, euler                  A = σ_s/σ_t,  B = α_s - A α_t: the direction of the noise is kept
    dpmpp_2m                     the same, with x̂0 extrapolated from two guesses in λ = log(α/σ)
    unipc                        the same after b, the x_t that is corrected by what x̂0(x_t) turned out to be
    heun                         the mean of the directions at both ends of a step; b is where it began
    ddpm, euler_ancestral        the posterior of x_s given x_t and x̂0, with f = σ_t² - (α_t/α_s)² σ_s²:
                                 A = (α_t/α_s) (σ_s/σ_t)²,  B = α_s f / σ_t²,  D² = f (σ_s/σ_t)²

Which timesteps are visited, and with which α and σ, is the process's `grid`; names that differ in that alone have one
row. Deterministic samplers are exact, for steps that are small enough, if `x_T` is drawn from the noise of training;
ancestral ones if they also inject that noise. Where the noise of a channel's mean has a power of its own at every
timestep (`adjusted` noise), the mean follows a table of its own, unless the process's target includes the noise's
change; an ancestral sampler has no need of it under a variance-preserving process: given x0, the shift enters as a
drift that grows with σ², and a bridge does not depend on its drift.

Sources: J. Song et al., arXiv 2010.02502 (DDIM); J. Ho et al., arXiv 2006.11239 (DDPM); T. Karras et al., arXiv
2206.00364 (Euler, Heun); C. Lu et al., arXiv 2211.01095 (DPM-Solver++); W. Zhao et al., arXiv 2302.04867 (UniPC); S.
Lin et al., arXiv 2305.08891 (spacings, rescaled guidance).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from offsetjax.diffusion.noise import Noise
from offsetjax.diffusion.process import Grid, Process, Times, Timestep

Name = Literal["ddim", "ddpm", "euler", "euler_ancestral", "dpmpp_2m", "heun", "unipc"]
NAMES: tuple[str, ...] = get_args(Name)
ANCESTRAL = ("ddpm", "euler_ancestral")
Denoiser = Callable[[Float[Array, "b c h w"], Timestep], Float[Array, "b c h w"]]
Injection = Callable[[Int[Array, ""]], Float[Array, "b c h w"]]
Row = Float[np.ndarray, "5 *c"]  # coefficients of x_t, b, x̂0(x_t), x̂0', x̂0''; each, or each of c channels


@dataclass(frozen=True)
class Table:
    """One sampler's evaluations of the network, from noisy to clean.

    Attributes:
        timesteps, network_timesteps: of each, the process's own and what the network receives.
        noisy: coefficients of the next x.
        kept: coefficients of the next b.
        noise: D.
        start: what the noise at the start is multiplied by.
    """

    timesteps: Times
    network_timesteps: Times
    noisy: Float[np.ndarray, "n 5 *c"]
    kept: Float[np.ndarray, "n 5 *c"]
    noise: Float[np.ndarray, "n *c"]
    start: float


@dataclass(frozen=True)
class _Nodes:
    """A grid's values, with a channel axis where the noise's standard deviation is part of σ."""

    alpha: np.ndarray
    sigma: np.ndarray
    alpha_after: np.ndarray
    sigma_after: np.ndarray
    log_snr: np.ndarray
    scale: np.ndarray

    def __len__(self) -> int:
        return len(self.alpha)

    def euler(self, i: int) -> tuple[Any, Any]:
        """A and B of a step that keeps the direction of the noise."""
        ratio = self.sigma_after[i] / self.sigma[i]
        return ratio, self.alpha_after[i] - ratio * self.alpha[i]

    def extrapolation(self, i: int) -> Any:
        """By how much of their difference x̂0 goes beyond the last guess; the first and the last step do not."""
        if not 0 < i < len(self) - 1:
            return np.zeros_like(self.sigma[i])
        return 0.5 * (self.log_snr[i + 1] - self.log_snr[i]) / (self.log_snr[i] - self.log_snr[i - 1])


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
    values = (grid.alpha, grid.sigma, grid.alpha_after, grid.sigma_after, grid.log_snr, grid.scale)
    nodes = _Nodes(*values)
    if deviations is not None:
        alpha, sigma, alpha_after, sigma_after, log_snr, scale = (value[:, None] for value in values)
        at, after = deviations
        nodes = _Nodes(alpha + 0 * at, sigma * at, alpha_after, sigma_after * after, log_snr - np.log(at), scale)
    make = {"dpmpp_2m": _extrapolated, "unipc": _corrected, "heun": _averaged, **dict.fromkeys(ANCESTRAL, _ancestral)}
    steps = list(make.get(name, _direct)(nodes))
    visited = [step.at for step in steps]
    return Table(
        grid.timesteps[visited],
        grid.network_timesteps[visited],
        noisy=np.stack([step.noisy for step in steps]),
        kept=np.stack([step.kept for step in steps]),
        noise=np.stack([step.noise for step in steps]),
        start=grid.start,
    )


def mean_table(name: Name, grid: Grid, process: Process, noise: Noise, height: int, width: int) -> Table | None:
    """The table of the channels' means, where it differs from that of the rest; see above."""
    if noise.growth is None or name in ANCESTRAL or process.includes_rate:
        return None
    at, after = (
        np.stack([np.sqrt(noise.power(height, width, timestep)[:, 0, 0]) for timestep in timesteps])
        for timesteps in (grid.timesteps, grid.timesteps_after)
    )
    return coefficients(name, grid, (at, after))


@dataclass(frozen=True)
class _Step:
    at: int  # the node where the network is evaluated
    noisy: Row
    kept: Row
    noise: np.ndarray | np.floating


def _step(at: int, noisy: Any, kept: Any = None, noise: Any = None) -> _Step:
    """A step from coefficients of which the last may be left out, as zeros."""
    rows = [
        [np.zeros_like(noisy[0]) + (row[k] if row and k < len(row) else 0) for k in range(5)] for row in (noisy, kept)
    ]
    return _Step(at, np.stack(rows[0]), np.stack(rows[1]), np.zeros_like(noisy[0]) if noise is None else noise)


def _direct(nodes: _Nodes) -> Iterator[_Step]:
    for i in range(len(nodes)):
        ratio, latent = nodes.euler(i)
        yield _step(i, (ratio, 0, latent))


def _extrapolated(nodes: _Nodes) -> Iterator[_Step]:
    for i in range(len(nodes)):
        (ratio, latent), beyond = nodes.euler(i), nodes.extrapolation(i)
        yield _step(i, (ratio, 0, latent * (1.0 + beyond), -latent * beyond))


def _corrected(nodes: _Nodes) -> Iterator[_Step]:
    """UniPC of order 2 with B(h) = e^h - 1: b is the corrected x_t, from which the next step starts."""
    for i in range(len(nodes)):
        (ratio, latent), beyond = nodes.euler(i), nodes.extrapolation(i)
        corrected = [np.ones_like(ratio), *np.zeros((4, *np.shape(ratio)))] if i == 0 else _correction(nodes, i)
        step = (0, 0, latent * (1.0 + beyond), -latent * beyond, 0)
        yield _step(i, [ratio * b + own for b, own in zip(corrected, step, strict=True)], corrected)


def _correction(nodes: _Nodes, i: int) -> list[Any]:
    """The coefficients of node i's corrected x, of which the step began at node i - 1."""
    ratio, latent = nodes.euler(i - 1)
    none = np.zeros_like(ratio)
    if i == 1:
        return [none, ratio, 0.5 * latent, 0.5 * latent, none]
    h = nodes.log_snr[i] - nodes.log_snr[i - 1]
    back = (nodes.log_snr[i - 2] - nodes.log_snr[i - 1]) / h
    # Solves ρ0 + ρ1 = b1, back ρ0 + ρ1 = b2 for φ-functions of -h, over B(h).
    phi = np.expm1(-h) / -h - 1.0
    b1, b2 = phi / np.expm1(-h), 2.0 * (phi / -h - 0.5) / np.expm1(-h)
    before = (b2 - b1) / (back - 1.0)
    here = b1 - before
    return [none, ratio, latent * here, latent * (1.0 - before / back - here), latent * before / back]


def _averaged(nodes: _Nodes) -> Iterator[_Step]:
    """Heun's method in x/scale over σ/scale: 2 n - 1 evaluations, for the last step is Euler's."""
    for i in range(len(nodes)):
        ratio, latent = nodes.euler(i)
        yield _step(i, (ratio, 0, latent), kept=(np.ones_like(ratio),))
        if i == len(nodes) - 1:
            return
        scale, scale_after = nodes.scale[i] + 0 * ratio, nodes.scale[i + 1] + 0 * ratio
        begin, end = nodes.sigma[i] / scale, nodes.sigma[i + 1] / scale_after
        half = 0.5 * (end - begin)
        kept = scale_after / scale * (1.0 + half / begin)
        yield _step(i + 1, (half / end, kept, -scale_after * half / end, -scale_after * half / begin))


def _ancestral(nodes: _Nodes) -> Iterator[_Step]:
    for i in range(len(nodes)):
        share = nodes.alpha[i] / nodes.alpha_after[i]
        fresh = nodes.sigma[i] ** 2 - (share * nodes.sigma_after[i]) ** 2  # the variance that is new between s and t
        shrink = (nodes.sigma_after[i] / nodes.sigma[i]) ** 2
        latent = nodes.alpha_after[i] * fresh / nodes.sigma[i] ** 2
        yield _step(i, (share * shrink, 0, latent), noise=np.sqrt(shrink * fresh))


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
        denoiser: `(x_t, what the network receives for t) -> prediction` of the process's kind, guidance included.
        start: drawn from the noise of training.
        inject: the noise of evaluation number i, for an ancestral sampler.
        mean_table: the coefficients of each channel's mean, where they differ from those of the rest.
    """
    used = [_used_columns(rows) for rows in (table.noisy, table.kept)]

    def combine(row: Array, values: tuple[Array, ...], uses: list[bool]) -> Array:
        terms = [row[k][..., None, None] * value for k, value in enumerate(values) if uses[k]]
        return sum(terms[1:], terms[0]) if terms else values[0]

    def step(carry: tuple[Array, ...], rows: tuple) -> tuple[tuple[Array, ...], None]:
        noisy, kept, last, before = carry
        index, timestep, network_timestep, (row, kept_row, noise), mean_rows = rows
        prediction = denoiser(noisy, network_timestep).astype(jnp.float32)
        latent, _ = process.to_latent_and_noise(noisy, prediction, timestep)
        values = (noisy, kept, latent, last, before)
        after, kept = combine(row, values, used[0]), combine(kept_row, values, used[1])
        if mean_rows is not None:
            means = tuple(value.mean((2, 3), keepdims=True) for value in values)
            after += combine(mean_rows[0], means, used[0]) - combine(row, means, used[0])
            kept += combine(mean_rows[1], means, used[1]) - combine(kept_row, means, used[1])
        if inject is not None:
            after += noise * inject(index)
        return (after, kept, latent, last), None

    def rows_of(table: Table) -> tuple[Array, ...]:
        return tuple(jnp.asarray(value, jnp.float32) for value in (table.noisy, table.kept, table.noise))

    rows: tuple = (
        jnp.arange(len(table.timesteps)),
        jnp.asarray(table.timesteps),
        jnp.asarray(table.network_timesteps),
        rows_of(table),
        rows_of(mean_table) if mean_table else None,
    )
    noisy = jnp.float32(table.start) * start
    none = jnp.zeros_like(noisy)
    state: tuple[Array, ...] = (noisy, noisy, none, none)
    return jax.lax.scan(step, state, rows)[0][0]


def _used_columns(rows: Any) -> list[bool]:
    """Which of the five states' coefficients are not all 0: what no row uses costs nothing. Traced ones may all be."""
    return [True] * 5 if isinstance(rows, jax.Array) else [bool(np.any(rows[:, k])) for k in range(5)]


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
