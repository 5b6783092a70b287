r"""What becomes of each frequency of measured data: where it is decided, how often that is trained, how much is drawn.

For a band of frequencies of the data's power D, under noise of the power P (see `spread.py`):

    t*          SNR_t D / P = 1: above it the band is decided
    trained     the share of the training above t*
    returned    √(Σ_c r² D / Σ_c D), r the share of a channel's standard deviation that a sampler ends with

A flow's sampler loses a strong band in the steps above t*; noise of more power there moves t* to where steps and
training are. A variance-preserving one begins without `√ᾱ_T x0`: in small steps it returns `1 / √(1 + τ)` of a band
whose terminal SNR is τ, 95 % for τ = 0.1.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from offsetjax.diffusion.calibration import band_means, interpolation
from offsetjax.diffusion.density import Density
from offsetjax.diffusion.noise import Noise
from offsetjax.diffusion.process import Process
from offsetjax.diffusion.sampler import ANCESTRAL, coefficients, mean_table
from offsetjax.diffusion.spread import Drawing, Modes, equal_at, returned

ENOUGH = 0.95  # of a band's spread
SEEN = 0.001  # the share of a training below which a place is as good as never seen
_POWERS = 10.0 ** np.linspace(0.0, 4.0, 81)
_SHIFTS = 1.25 ** np.arange(1, 20)


@dataclass(frozen=True)
class Bands:
    """The power of the data by band, about its mean picture; band 0 is the channels' means.

    Attributes:
        number: the band of each mode.
    """

    power: Float[np.ndarray, "c k"]
    number: Int[np.ndarray, "h w2"]
    height: int
    width: int


@dataclass(frozen=True)
class BandReach:
    """Of each band, of the channel where it is strongest: t*, as a share of the timesteps, and the rest as above."""

    equal: Float[np.ndarray, " k"]
    trained: Float[np.ndarray, " k"]
    returned: Float[np.ndarray, " k"]


@dataclass(frozen=True)
class Remedy:
    """What returns `ENOUGH` of each band; None where nothing of its kind does.

    Attributes:
        offset: strength of an offset on plain noise, for the whole picture's mean; 0: plain noise will do.
        spectrum: a formula for `noise.spectrum`, for every band; None as well where an offset does it all.
        shift: of the sampler's grid, with plain noise.
    """

    offset: float | None
    spectrum: str | None
    shift: float | None


def band_reach(process: Process, noise: Noise, density: Density, drawing: Drawing, bands: Bands) -> BandReach:
    """The reach of every band, under the noise of training."""
    height, width = bands.height, bands.width
    coloured = noise.coloured_power(height, width)
    pixels = np.ones((1, height, width // 2 + 1)) if coloured is None else coloured
    white, total = (band_means(each, bands.number, width) for each in (pixels, noise.power(height, width)))
    data, white, total = np.broadcast_arrays(np.maximum(bands.power, 1e-12), white, total)
    modes = Modes(data, white, total - white)
    grid = process.grid(drawing.sampler, drawing.num_steps, drawing.spacing, drawing.shift)
    table, injects = coefficients(drawing.sampler, grid), drawing.sampler in ANCESTRAL
    shares = returned(process, noise, modes, (table, None), injects=injects)
    own = mean_table(drawing.sampler, grid, process, noise, height, width)
    if own is not None:
        means = Modes(*(np.ascontiguousarray(each[:, 0]) for each in (modes.data, modes.pixels, modes.offset)))
        shares[:, 0] = returned(process, noise, means, (table, own), injects=injects)
    strongest = (data.argmax(0), np.arange(data.shape[1]))
    equal = equal_at(process, noise, modes)[strongest]
    return BandReach(equal, _trained(process, density, equal, height * width), _joined(shares, data))


def remedy(process: Process, density: Density, drawing: Drawing, bands: Bands) -> Remedy:
    """What a config needs beside plain noise for its sampler and its density."""
    powers = _least_powers(process, density, drawing, bands)
    mean, others = powers[0], powers[1:]
    pixels = bands.height * bands.width
    offset = None if np.isnan(mean) else _rounded_up(np.sqrt((mean - 1.0) / pixels))
    # From the first band on that comes back by itself, what others lack is lost at the clean end: no noise mends it.
    wanted = np.nan_to_num(others, nan=1.0)
    wanted[np.argmax(np.append(wanted, 1.0) == 1.0) :] = 1.0
    spectrum = None
    if not np.isnan(mean) and wanted.max(initial=1.0) > 1.0:
        half = 0.5 / max(bands.height, bands.width)
        radius = np.hypot(np.fft.fftfreq(bands.height)[:, None], np.fft.rfftfreq(bands.width))
        places = np.insert(band_means(radius, bands.number, bands.width), 1, half)
        spectrum = interpolation(places, np.concatenate([[mean], wanted[:1], wanted]))
    return Remedy(offset, spectrum, _least_shift(process, drawing, bands))


def _least_powers(process: Process, density: Density, drawing: Drawing, bands: Bands) -> Float[np.ndarray, " k"]:
    """The least noise power with which each band comes back, and is trained; nan where none does."""
    tried = Modes(
        *np.broadcast_arrays(np.maximum(bands.power, 1e-12)[:, None, :], _POWERS[None, :, None], np.zeros((1, 1, 1)))
    )
    table = coefficients(
        drawing.sampler, process.grid(drawing.sampler, drawing.num_steps, drawing.spacing, drawing.shift)
    )
    white = Noise("offset", np.zeros(1))
    shares = _joined(returned(process, white, tried, (table, None), injects=drawing.sampler in ANCESTRAL), tried.data)
    strongest = Modes(*(each.max(0) for each in (tried.data, tried.pixels, tried.offset)))
    equal = equal_at(process, white, strongest)
    trained = _trained(process, density, equal.ravel(), bands.height * bands.width).reshape(equal.shape)
    # Of so few steps nothing may return ENOUGH: what comes close to the most will do.
    most = shares.max(0)
    enough = np.where(most >= ENOUGH, ENOUGH, 0.99 * most)
    # What is legible at every timestep is decided at none: there the start alone counts.
    is_enough = (shares >= enough) & ((trained >= SEEN) | (equal >= 1.0))
    found = np.where(is_enough.any(0), _POWERS[is_enough.argmax(0)], np.nan)
    # What is weaker than plain noise is decided at the clean end, where no noise helps.
    return np.where(bands.power.max(0) > 1.0, found, 1.0)


def _least_shift(process: Process, drawing: Drawing, bands: Bands) -> float | None:
    """The least shift of the grid with which plain noise returns brightness, and others lose no more than 1 %.

    None: there is none.
    """
    plain = Modes(*np.broadcast_arrays(np.maximum(bands.power, 1e-12), 1.0, 0.0))
    white = Noise("offset", np.zeros(1))

    def shares(shift: float) -> Float[np.ndarray, " k"]:
        grid = process.grid(drawing.sampler, drawing.num_steps, drawing.spacing, shift)
        table = coefficients(drawing.sampler, grid)
        return _joined(returned(process, white, plain, (table, None), injects=drawing.sampler in ANCESTRAL), plain.data)

    present = shares(drawing.shift)
    if np.array_equal(present, shares(2.0 * drawing.shift)):  # a process without a shift
        return None
    wanted = np.minimum(present - 0.01, ENOUGH)
    wanted[0] = ENOUGH
    for factor in _SHIFTS:
        if (shares(drawing.shift * factor) >= wanted).all():
            return float(f"{drawing.shift * factor:.2g}")
    return None


def _joined(shares: Float[np.ndarray, "c *s"], data: Float[np.ndarray, "c *s"]) -> Float[np.ndarray, "*s"]:
    """Over channels."""
    joined: Float[np.ndarray, "*s"] = np.sqrt((shares**2 * data).sum(0) / data.sum(0))
    return joined


def _trained(
    process: Process, density: Density, equal: Float[np.ndarray, " k"], pixels: int
) -> Float[np.ndarray, " k"]:
    shift = process.shift_at(pixels)
    return np.array([density.share_above(float(each), shift) for each in equal])


def _rounded_up(value: float) -> float:
    """To two digits."""
    if value == 0.0:
        return 0.0
    unit = 10.0 ** (np.floor(np.log10(value)) - 1)
    return float(f"{np.ceil(value / unit - 1e-9) * unit:.2g}")
