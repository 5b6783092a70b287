r"""How much of the data's spread a sampler returns, for normal data and the exact denoiser; without any network.

A mode of the latents (a channel's mean, say) has the power D in the data, and in the noise `P_t = W + ψ_t² C`, W of the
pixels and C of the offset. The best prediction is then linear in the mode, `E[y x_t] / E[x_t²] x_t` about the mean for
any target y, and so is each step of a sampler's table: of the standard deviation √D of the data, what comes out at the
end is a product of so many lines. A grid that is too coarse returns less than 1, and so does a start that is not the
noise of training; a variance-preserving process also lacks `√ᾱ_T x0` at its start.

The mode is as strong as its noise at t*, `SNR_t D / P_t = 1`: above it the mode is decided. Where a density trains
there next to never, a network has not learnt what the exact denoiser knows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from offsetjax.diffusion.density import Density
from offsetjax.diffusion.noise import Noise
from offsetjax.diffusion.process import Process, mode_snr
from offsetjax.diffusion.sampler import ANCESTRAL, Name, Table, coefficients, mean_table

Powers = Float[np.ndarray, "*modes"]

DEFAULT_DEVIATION = 0.6  # of a channel's mean over pictures, where nothing was measured


@dataclass(frozen=True)
class Moments:
    """Mean and variance of modes, in units in which white noise has variance 1."""

    mean: Any
    variance: Any


def follow(table: Table, guesses: Sequence[tuple[Any, Any, Any]], begin: Moments, injected: Any = 0.0) -> Moments:
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


@dataclass(frozen=True)
class Modes:
    """The powers of modes, in units in which white noise has power 1; all of one shape."""

    data: Powers  # D, about the data's mean
    pixels: Powers  # W
    offset: Powers  # C, of the last timestep


def channel_means(noise: Noise, deviation: float | Float[np.ndarray, " c"], height: int, width: int) -> Modes:
    """The modes of the channels' means: brightness.

    Args:
        noise: of training. Where strengths are random the powers are expected ones.
        deviation: standard deviation of a latent's channel mean over pictures.
    """
    total = noise.power(height, width)[:, 0, 0]
    white = np.ones(1) if noise.spectrum is None else noise.spectrum(height, width)[:, 0, 0]
    data = height * width * np.square(np.asarray(deviation, np.float64))
    data, total, white = np.broadcast_arrays(data, total, white)
    return Modes(np.atleast_1d(data), np.atleast_1d(white), np.atleast_1d(total - white))


def equal_at(process: Process, noise: Noise, modes: Modes) -> Powers:
    """t*, as a share of the timesteps: above it a mode's noise is stronger than the mode; 1 where it never is."""
    count = process.num_train_timesteps
    numbers = np.arange(count + 1)
    if process.timestep_at(count) > process.last_timestep:  # of whole timesteps the last is one less
        numbers = numbers[:-1]
    with np.errstate(divide="ignore"):  # nothing hides the data at t = 0
        ratio = np.array(
            [
                np.sqrt(mode_snr(modes.data, _noise_power(noise, modes, t), process.snr(t)))
                for t in process.timestep_at(numbers.astype(np.asarray(process.last_timestep).dtype))
            ]
        )
    share = 1.0 / (1.0 + ratio)  # of the noise in the sum of both; rises, and is smooth at both ends
    found = [np.interp(0.5, each, numbers, right=count) for each in share.reshape(len(numbers), -1).T]
    return np.reshape(found, modes.data.shape) / count


def share_trained(process: Process, density: Density, equal: float, pixels: int) -> float:
    """The share of a training above t*, of latents of so many pixels."""
    return density.share_above(equal, process.shift_at(pixels))


def returned(
    process: Process,
    noise: Noise,
    modes: Modes,
    tables: tuple[Table, Table | None],
    start: Modes | None = None,
    injects: bool = False,
) -> Powers:
    """The standard deviation that a sampler ends with, as a share of the data's.

    Args:
        noise: of training, by which the denoiser is exact.
        tables: the sampler's, and that of the means where they have one.
        start: the modes of the noise that is started from; None: of training.
        injects: whether the sampler adds noise, of the start's kind.
    """
    table = tables[1] or tables[0]
    start = start or modes
    gains = [_gain(process, noise, modes, timestep) for timestep in table.timesteps]
    power = start.pixels + start.offset
    begin = Moments(np.zeros_like(modes.data), table.start**2 * power)
    # An offset that grows with time is drawn once, at the start.
    injected = (start.pixels if noise.growth is not None else power) if injects else 0.0
    end = follow(table, [(0.0, gain, 0.0) for gain in gains], begin, injected)
    return np.sqrt(end.variance / modes.data)


def _noise_power(noise: Noise, modes: Modes, timestep: Any) -> Powers:
    return modes.pixels + _growth(noise, timestep)[0] ** 2 * modes.offset


def _growth(noise: Noise, timestep: Any) -> tuple[Any, Any]:
    return (1.0, 0.0) if noise.growth is None else noise.growth(timestep)


def _gain(process: Process, noise: Noise, modes: Modes, timestep: Any) -> Powers:
    """k of `x̂0 = k x_t`: what the best linear prediction of the target stands for."""
    psi, rate = _growth(noise, timestep)
    alpha, sigma = process.scales(timestep)
    power = _noise_power(noise, modes, timestep)

    def target(latent: Any, noise: Any, rate: Any) -> Any:
        return process.target(latent, noise, rate, timestep)

    with_noise = target(0.0, 1.0, 0.0) * power + target(0.0, 0.0, 1.0) * psi * rate * modes.offset
    with_data = target(1.0, 0.0, 0.0) * modes.data
    prediction: Any = (alpha * with_data + sigma * with_noise) / (alpha**2 * modes.data + sigma**2 * power)
    unit: Any = np.ones_like(modes.data)
    gain: Any = process.to_latent_and_noise(unit, prediction, timestep)[0]
    return gain


@dataclass(frozen=True)
class Reach:
    """What becomes of a mode: of brightness, the channel of which the least comes back.

    Attributes:
        equal: t*, as a share of the timesteps.
        trained: the share of training above it.
        matched, plain: the share of the data's standard deviation that comes back, from the noise of training and from
            plain noise.
    """

    equal: float
    trained: float
    matched: float
    plain: float


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn: a sampler, its steps, and the shift of its grid."""

    sampler: Name
    num_steps: int
    spacing: str
    shift: float = 1.0


def reach(
    process: Process,
    noise: Noise,
    density: Density,
    drawing: Drawing,
    deviation: float | Float[np.ndarray, " c"],
    height: int,
    width: int,
) -> Reach:
    """The reach of brightness, for latents of a size; `deviation` as in `channel_means`."""
    modes = channel_means(noise, deviation, height, width)
    grid = process.grid(drawing.sampler, drawing.num_steps, drawing.spacing, drawing.shift)
    table, injects = coefficients(drawing.sampler, grid), drawing.sampler in ANCESTRAL
    own = mean_table(drawing.sampler, grid, process, noise, height, width)
    white = Modes(modes.data, np.ones_like(modes.data), np.zeros_like(modes.data))
    matched = returned(process, noise, modes, (table, own), injects=injects)
    # Whoever starts from plain noise knows nothing of a table for the means either.
    plain = matched if noise.is_plain else returned(process, noise, modes, (table, None), white, injects)
    worst = int(np.argmin(matched))
    equal = float(equal_at(process, noise, modes)[worst])
    trained = share_trained(process, density, equal, height * width)
    return Reach(equal, trained, float(matched[worst]), float(plain[worst]))
