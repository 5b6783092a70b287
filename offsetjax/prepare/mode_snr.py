"""The figure of a calibration: how much of the data is legible in noisy latents, by wavelength and timestep."""

import math
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from offsetjax.diffusion.calibration import Calibration, band_means, radial_bands
from offsetjax.diffusion.noise import PLAIN, Noise
from offsetjax.diffusion.process import Process, mode_snr
from offsetjax.plots import style

# Of the figure, at an SNR of 1 and at the target.
_LINES: tuple[dict[str, Any], ...] = (
    {"color": "#222222", "lw": 1.2, "ls": "-"},
    {"color": "#222222", "lw": 1.2, "ls": "--"},
)


@style
def mode_snr_figure(calibration: Calibration, noise: Noise, recommended: Noise, process: Process) -> Figure:
    """The SNR by wavelength and timestep of the channel where it is largest: plain, configured, recommended noise."""
    noises = {"plain noise": PLAIN}
    if not noise.is_plain:
        noises[f"this config's noise ({noise.kind})"] = noise
    if recommended.strengths.any():
        kind = "" if recommended.kind == "offset" else f"{recommended.kind}, "
        noises[f"recommended: {kind}offset strength {recommended.strengths.max():.3g}"] = recommended
    steps = np.unique(
        np.linspace(1, process.num_train_timesteps - 1, 201).round().astype(int)
    )  # 0 may be no noise at all
    canvas = Figure(figsize=(1.2 + 3.2 * len(noises), 4.2), layout="constrained")
    panels = canvas.subplots(1, len(noises), sharey=True, squeeze=False)[0]
    for axes, (name, each) in zip(panels, noises.items(), strict=True):
        filling = _panel(axes, calibration, _log_snrs(calibration, each, process, steps), steps)
        axes.set(title=name, xlabel="wavelength (latent pixels)")
    panels[0].set_ylabel("timestep")
    bar = canvas.colorbar(
        filling, ax=panels, pad=0.02, ticks=[-4, -2, 0, 2, 4], format=lambda x, _: f"$10^{{{x:.0f}}}$"
    )
    bar.set_label("SNR of the band, the channel where it is largest")
    canvas.suptitle("How legible the data is in noisy latents: red can be read, blue is buried in noise")
    levels = ("SNR 1", f"the target, SNR {calibration.target_terminal_snr:g}")
    lines = [Line2D([], [], label=label, **line) for label, line in zip(levels, _LINES, strict=True)]
    canvas.legend(handles=lines, loc="outside lower center", ncols=2)
    return canvas


def _log_snrs(
    calibration: Calibration, noise: Noise, process: Process, steps: Int[np.ndarray, " t"]
) -> Float[np.ndarray, "t k"]:
    """The logarithm to base 10 of the SNR of the channel where it is largest."""
    height, width = calibration.height, calibration.width
    bands, _ = radial_bands(height, width)
    timesteps = [process.timestep_at(int(step)) for step in steps]
    noise_power = np.stack([band_means(noise.power(height, width, each), bands, width) for each in timesteps])
    snrs = np.array([process.snr(each) for each in timesteps])
    ratios = mode_snr(calibration.power, noise_power, snrs[:, None, None]).max(1)
    return np.log10(np.maximum(ratios, 1e-12))


def _panel(axes: Axes, calibration: Calibration, log_snrs: Float[np.ndarray, "t k"], steps: np.ndarray) -> Any:
    """Draws the whole picture as a column of its own left of the bands; returns what a colour bar needs."""
    places = np.log2(calibration.frequency[1:])
    gap = 0.12 * (places[-1] - places[0])
    column = np.array([places[0] - 2 * gap, places[0] - 0.5 * gap])
    for x, z in ((column, np.repeat(log_snrs[:, :1], 2, 1)), (places, log_snrs[:, 1:])):
        filling = axes.contourf(x, steps, z, np.linspace(-4, 4, 17), cmap="RdBu_r", extend="both")
        for level, line in zip((0.0, math.log10(calibration.target_terminal_snr)), _LINES, strict=True):
            if z.min() < level < z.max():
                axes.contour(x, steps, z, [level], colors=line["color"], linewidths=line["lw"], linestyles=line["ls"])
    sides = [side for side in (64, 32, 16, 8, 4, 2) if places[0] <= -math.log2(side) <= places[-1]]
    axes.xaxis.set_major_locator(FixedLocator([column.mean(), *(-math.log2(side) for side in sides)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels(["whole\npicture", *map(str, sides)])
    return filling
