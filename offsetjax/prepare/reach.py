"""A calibration's page for any process: what becomes of each wavelength of the data, and what would mend it."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from offsetjax.diffusion.band_reach import ENOUGH, SEEN, BandReach, Bands, Remedy, band_reach, remedy
from offsetjax.diffusion.calibration import Calibration, band_means, radial_bands
from offsetjax.diffusion.density import Density
from offsetjax.diffusion.noise import PLAIN, Noise
from offsetjax.diffusion.process import Process
from offsetjax.diffusion.spectrum import frequencies
from offsetjax.diffusion.spread import Drawing
from offsetjax.plots import GREY, colour, style


@dataclass(frozen=True)
class Drawn:
    """What a config's training and its sampler are to the data."""

    process: Process
    density: Density
    drawing: Drawing

    def reach(self, noise: Noise, bands: Bands) -> BandReach:
        return band_reach(self.process, noise, self.density, self.drawing, bands)


def radial(calibration: Calibration) -> Bands:
    """The bands of a calibration's file."""
    number, _ = radial_bands(calibration.height, calibration.width)
    return Bands(calibration.power, number, calibration.height, calibration.width)


def reach_advice(drawn: Drawn, calibration: Calibration) -> Remedy:
    """What the config needs to return the data's spread."""
    return remedy(drawn.process, drawn.density, drawn.drawing, radial(calibration))


def reach_table(
    drawn: Drawn,
    calibration: Calibration,
    variance: Float[np.ndarray, "c h w2"],
    noise: Noise,
    advice: Remedy,
    recommended: Noise,
) -> Iterator[str]:
    """The lines to print: an octave each, under plain noise and the config's, and what is recommended.

    Args:
        advice: its offset is in the config's own terms, as `noise.offset_strength` takes it.
        recommended: the config's noise with that offset.
    """
    height, width = calibration.height, calibration.width
    number, names = octaves(height, width)
    bands = Bands(band_means(variance, number, width), number, height, width)
    noises = {"plain noise": PLAIN} | ({} if noise.is_plain else {f"this config ({noise.kind})": noise})
    found = {name: drawn.reach(each, bands) for name, each in noises.items()}
    steps, last = drawn.drawing.num_steps, drawn.process.num_train_timesteps
    yield (
        f"of the data's spread, by the algebra of an exact denoiser: where it is decided, how much of the training is "
        f"there, and what {steps} steps of {drawn.drawing.sampler} return"
    )
    yield f"{'wavelength in':>16}" + "".join(f"{name:^38}" for name in noises)
    head = f"{'above timestep':>15}{'trained':>11}{'returned':>12}"
    yield f"{'latent pixels':>16}" + head * len(noises)
    for place, name in enumerate(names):
        cells = "".join(_cells(each, place, last) for each in found.values())
        yield f"{name:>16}{cells}"
    yield from _recommendation(drawn, calibration, advice, recommended)


def _cells(reach: BandReach, place: int, last: int) -> str:
    equal, trained = reach.equal[place], reach.trained[place]
    decided, seen = (f"{equal * last:.0f}", _percent(trained)) if equal < 1.0 else ("none", "-")
    return f"{decided:>15}{seen:>11}{reach.returned[place]:>12.0%}"


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%"


def _recommendation(drawn: Drawn, calibration: Calibration, advice: Remedy, recommended: Noise) -> Iterator[str]:
    steps, bands = drawn.drawing.num_steps, radial(calibration)
    plain = drawn.reach(PLAIN, bands)
    if advice.offset == 0.0 and advice.spectrum is None:
        share = f"{steps} steps return {plain.returned[0]:.0%} of the spread of brightness"
        if plain.returned[0] >= ENOUGH - 0.01:
            yield f"recommended: plain noise is good enough: {share}"
        else:
            yield f"recommended: plain noise and more sample.num_steps: {share}, and lose the rest near the picture"
        return
    if advice.offset:
        with_offset = drawn.reach(recommended, bands)
        seen = f", and {_percent(with_offset.trained[0])} of the training is there" if with_offset.equal[0] < 1 else ""
        yield (
            f"for brightness: noise.offset_strength = {advice.offset:g}: {steps} steps return "
            f"{with_offset.returned[0]:.0%} of its spread, with plain noise {plain.returned[0]:.0%}{seen}"
        )
    if advice.offset is None:
        yield (
            f"no strength returns the spread of brightness in {steps} steps and is trained there; take more "
            "sample.num_steps, or a timesteps.density that leans to noise"
        )
    if advice.shift is not None and plain.trained[0] >= SEEN:
        yield f"or, with plain noise, sample.shift = {advice.shift:g}"
    if advice.spectrum is not None:
        yield (
            f"for wavelengths shorter than the picture as well, of which plain noise returns {plain.returned[1]:.0%} "
            f"and more: noise.kind = 'spectral', noise.spectrum = ({advice.spectrum!r},)"
        )


@style
def reach_figure(drawn: Drawn, calibration: Calibration, noise: Noise, recommended: Noise) -> Figure:
    """By wavelength: what comes back, and how much of the training decides it; plain, configured, recommended noise."""
    noises = {"plain noise": PLAIN}
    if not noise.is_plain:
        noises[f"this config's noise ({noise.kind})"] = noise
    if not recommended.is_plain:
        noises[f"recommended: offset {recommended.strengths.max():.2g}"] = recommended
    bands = radial(calibration)
    found = {name: drawn.reach(each, bands) for name, each in noises.items()}
    canvas = Figure(figsize=(9.6, 4.4), layout="constrained")
    left, right = canvas.subplots(1, 2)
    steps = drawn.drawing.num_steps
    left.axhline(100 * ENOUGH, color="#888888", lw=1, ls="--")
    right.axhline(100 * SEEN, color="#888888", lw=1, ls="--")
    for (name, each), ink in zip(found.items(), (GREY, colour(1), colour(2)), strict=False):
        _line(left, calibration, 100 * each.returned, ink, name)
        # What is decided at no timestep is trained at none.
        _line(right, calibration, np.where(each.equal < 1.0, np.maximum(100 * each.trained, 1e-5), np.nan), ink, name)
    left.set(title=f"Of the data's spread, {steps} steps return", ylim=(0, 105))
    right.set(title="Of the training, this much is where a wavelength is decided", yscale="log")
    right.set_ylim(top=130)
    for axes in (left, right):
        axes.yaxis.set_major_formatter(FuncFormatter(_axis_percent))
        axes.set_xlabel("wavelength (latent pixels)")
    for axes, share, words in ((left, ENOUGH, "enough"), (right, SEEN, "hardly learnt below")):
        axes.text(
            0.98, 100 * share, words, transform=axes.get_yaxis_transform(), ha="right", va="bottom", color="#666666"
        )
    canvas.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return canvas


def _axis_percent(value: float, _: int) -> str:
    return f"{np.format_float_positional(value, trim='-')} %"


def _line(axes: Axes, calibration: Calibration, values: Float[np.ndarray, " k"], ink: str, name: str) -> None:
    """The whole picture as a mark of its own, left of the bands."""
    places = np.log2(calibration.frequency[1:])
    whole = places[0] - 0.12 * (places[-1] - places[0])
    axes.plot(places, values[1:], color=ink, lw=1.8, label=name)
    axes.plot([whole, places[0]], values[:2], color=ink, lw=0.8, ls=":")
    if np.isfinite(values[0]):
        axes.plot([whole], values[:1], "o", color=ink, ms=9)
        axes.annotate(f"{values[0]:.2g} %", (whole, values[0]), (9, 0), textcoords="offset points", va="center",
                      color=ink, fontweight="bold")  # fmt: skip
    sides = [side for side in (64, 32, 16, 8, 4, 2) if places[0] <= -np.log2(side) <= places[-1]]
    axes.xaxis.set_major_locator(FixedLocator([whole, *(-np.log2(side) for side in sides)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels(["whole\npicture", *map(str, sides)])


def octaves(height: int, width: int) -> tuple[Int[np.ndarray, "h w2"], list[str]]:
    """The octave of wavelengths of each mode, from 32 latent pixels down, and the names of those that the grid has."""
    names = ["whole picture", "32 and more", *(f"{2 * side} - {side}" for side in (16, 8, 4, 2)), "under 2"]
    edges = [0.0, *(1 / side for side in (32, 16, 8, 4, 2))]
    # A hair less, so that a wavelength of 32 latent pixels is where it belongs whatever the rounding.
    octave = np.digitize(np.hypot(*frequencies(height, width)) * (1 - 1e-9), edges, right=True)
    found, bands = np.unique(octave, return_inverse=True)
    return bands.reshape(octave.shape), [names[each] for each in found]
