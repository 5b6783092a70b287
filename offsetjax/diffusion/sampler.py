r"""Samplers from T to 0, each a table of coefficients for one recurrence.

    x_s = A x_t + B x̂0(x_t) + C x̂0(x_previous) + D z,    s < t the next time step of the grid, z the injected noise

With `α_t = √ᾱ_t` and σ_t the deviation of the noise in `x_t` (`√(1-ᾱ_t)`, times the noise's own):

    ddim, euler                  A = σ_s/σ_t,  B = α_s - A α_t: the direction of the noise is kept
    dpmpp_2m                     the same, with x̂0 extrapolated from two steps in λ = log(α/σ)
    ddpm, euler_ancestral        the posterior of x_s given x_t and x̂0; σ in units of the noise

DDIM and Euler differ in where they end (ᾱ_0, or no noise at all) and in the scale they start from; Euler's ancestral
form is DDPM in the same way. Deterministic samplers are exact, for steps that are small enough, if `x_T` is drawn from
the noise of training; ancestral ones if they also inject that noise. Where the noise of a channel's mean has a power of
its own at every time step (`adjusted` noise), the mean follows a table of its own; an ancestral sampler has no need of
it: given x0, the shift enters as a drift that grows with σ², and a bridge does not depend on its drift.

Sources: J. Song et al., arXiv 2010.02502 (DDIM); J. Ho et al., arXiv 2006.11239 (DDPM); T. Karras et al., arXiv
2206.00364 (Euler); C. Lu et al., arXiv 2211.01095 (DPM-Solver++); S. Lin et al., arXiv 2305.08891 (spacings, rescaled
guidance).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from offsetjax.diffusion.schedule import Schedule, to_latent_and_noise

Name = Literal["ddim", "ddpm", "euler", "euler_ancestral", "dpmpp_2m"]
NAMES: tuple[str, ...] = get_args(Name)
ANCESTRAL = ("ddpm", "euler_ancestral")
Spacing = Literal["trailing", "leading"]
Denoiser = Callable[[Float[Array, "b c h w"], Int[Array, ""]], Float[Array, "b c h w"]]
Injection = Callable[[Int[Array, ""]], Float[Array, "b c h w"]]


@dataclass(frozen=True)
class Table:
    """One sampler's time steps `[n]`, its coefficients `[n]` or, a channel, `[n, c]`, and the scale of its start."""

    timesteps: Int[np.ndarray, " n"]
    noisy: Float[np.ndarray, "n *c"]  # A
    latent: Float[np.ndarray, "n *c"]  # B
    previous_latent: Float[np.ndarray, "n *c"]  # C
    noise: Float[np.ndarray, "n *c"]  # D
    start: float


def timestep_grid(
    num_train_timesteps: int, num_steps: int, spacing: Spacing, name: Name = "ddim"
) -> Int[np.ndarray, " n"]:
    """The time steps visited, from noisy to clean, as PyTorch diffusers' schedulers choose them.

    Args:
        spacing: "trailing" begins at the last time step, T - 1; "leading" is Stable Diffusion's default, with the
            offset of one step that its scheduler has (`steps_offset=1`), and never visits the noisiest steps.
    """
    if spacing == "trailing":
        grid = np.arange(num_train_timesteps, 0, -num_train_timesteps / num_steps)
        return np.round(grid[:num_steps]).astype(np.int32) - 1  # for some n, such as 61 of 1,000, rounding adds one
    skipped = int(name == "dpmpp_2m")  # which leaves out the grid's cleanest step
    whole_stride = num_train_timesteps // (num_steps + skipped)
    return ((np.arange(num_steps)[::-1] + skipped) * whole_stride + 1).astype(np.int32)


def coefficients(
    name: Name,
    schedule: Schedule,
    num_steps: int,
    spacing: Spacing,
    root_power: Float[np.ndarray, "T c"] | None = None,
) -> Table:
    """The table of a sampler, in float64.

    Args:
        root_power: the deviation of a mode's noise at each time step, where it changes with time; only for the
            deterministic samplers.
    """
    kept = np.asarray(schedule.alphas_cumprod, np.float64)
    timesteps = timestep_grid(len(kept), num_steps, spacing, name)
    if name == "ddim":  # it counts back from each step, and ends at ᾱ_0 (diffusers: set_alpha_to_one=False)
        following = np.maximum(timesteps - len(kept) // num_steps, 0)
        kept_after = kept[following]
    else:
        following = np.append(timesteps[1:], 0)
        kept_after = np.append(kept[timesteps[1:]], 1.0)
    alpha, alpha_after = np.sqrt(kept[timesteps]), np.sqrt(kept_after)
    sigma, sigma_after = np.sqrt(1.0 - kept[timesteps]), np.sqrt(1.0 - kept_after)
    start = sigma[0] if name.startswith("euler") and spacing == "trailing" else 1.0
    if root_power is not None:
        sigma, sigma_after = sigma[:, None] * root_power[timesteps], sigma_after[:, None] * root_power[following]
        alpha, alpha_after = alpha[:, None], alpha_after[:, None]

    none = np.zeros_like(sigma)
    if name in ANCESTRAL:
        fresh = 1.0 - kept[timesteps] / kept_after  # the share of the variance that is new between s and t
        shrink = (sigma_after / sigma) ** 2
        return Table(
            timesteps,
            noisy=alpha / alpha_after * shrink,
            latent=alpha_after * fresh / sigma**2,
            previous_latent=none,
            noise=np.sqrt(shrink * fresh),
            start=float(start),
        )
    ratio = sigma_after / sigma
    latent = alpha_after - ratio * alpha
    extrapolation = none.copy()
    if name == "dpmpp_2m":
        # λ at a zero SNR is infinite; the value that diffusers gives it there keeps the differences finite.
        log_snr = np.log(np.maximum(alpha, 2.0**-12) / sigma)
        width = np.diff(log_snr, axis=0)  # of the step that begins at i
        extrapolation[1:-1] = 0.5 * width[1:] / width[:-1]  # the first and the last step are of first order
    return Table(
        timesteps,
        noisy=ratio,
        latent=latent * (1.0 + extrapolation),
        previous_latent=-latent * extrapolation,
        noise=none,
        start=float(start),
    )


def solve(
    denoiser: Denoiser,
    schedule: Schedule,
    table: Table,
    start: Float[Array, "b c h w"],
    inject: Injection | None = None,
    mean_table: Table | None = None,
) -> Float[Array, "b c h w"]:
    """Follows a table from the noise `start` to latents, as one `lax.scan`.

    Args:
        denoiser: `(x_t, t) -> prediction` of the schedule's type, guidance included.
        start: drawn from the noise of training.
        inject: the noise of step number i, for an ancestral sampler.
        mean_table: the coefficients of each channel's mean, where they differ from those of the rest.
    """

    def combine(row: tuple[Array, ...], noisy: Array, latent: Array, previous: Array) -> Array:
        a, b, c, _ = (value[..., None, None] for value in row)
        return a * noisy + b * latent + c * previous

    def step(carry: tuple[Array, Array], rows: tuple) -> tuple[tuple[Array, Array], None]:
        noisy, previous = carry
        index, timestep, row, mean_row = rows
        latent, _ = to_latent_and_noise(schedule, noisy, denoiser(noisy, timestep).astype(jnp.float32), timestep)
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
        rows_of(table),
        rows_of(mean_table) if mean_table else None,
    )
    noisy = jnp.float32(table.start) * start
    return jax.lax.scan(step, (noisy, jnp.zeros_like(noisy)), rows)[0][0]


def guided(
    unconditional: Float[Array, "b c h w"], conditional: Float[Array, "b c h w"], scale: float, rescale: float
) -> Float[Array, "b c h w"]:
    """Classifier-free guidance (arXiv 2207.12598), its deviation drawn back by `rescale` to the conditional one's.

    Args:
        rescale: φ of arXiv 2305.08891, 3.4: 0 is plain guidance, 0.7 the paper's value.
    """
    prediction = unconditional + scale * (conditional - unconditional)
    if rescale == 0:
        return prediction
    # PyTorch's std, and so the one of those who sample elsewhere, divides by n - 1; the ratio is the same.
    deviations = [value.std((1, 2, 3), keepdims=True) for value in (conditional, prediction)]
    return prediction * (rescale * deviations[0] / deviations[1] + 1.0 - rescale)
