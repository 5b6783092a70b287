r"""What the data says about the noise that it needs: a calibration file, and what follows from it.

At timestep t a band of frequencies f is legible in a noisy latent by its own signal-to-noise ratio,

    SNR_t(f) = SNR_t P(f) / S(f),    P the power of the data around its mean picture, S that of the noise

in orthonormal units, where plain noise has S = 1 and the mean of a channel, of variance `Var(mean)` over pictures, is
the mode f = 0 with `P(0) = N Var(mean)` for N latent pixels. A terminal SNR, at the last timestep T, of at most τ asks
for

    c² = max(0, SNR_T Var(mean) / τ - S(0) / N)    for an offset of strength c on top of noise of the spectrum S
    S(f) = max(1, SNR_T P(f) / τ)                  for spectral noise

`offsetjax calibrate` measures P and writes the file; `filled` puts into a config what follows. Sources: N. Guttenberg,
"Diffusion with Offset Noise", CrossLabs, 2023, for the terminal SNR of the mean; S. Lin et al., arXiv 2305.08891,
for SNR_T.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Complex, Float, Int
from ml_collections import ConfigDict

from offsetjax.diffusion.noise import make_noise
from offsetjax.diffusion.process import Process, mode_snr
from offsetjax.diffusion.spectrum import frequencies, multiplicity
from offsetjax.errors import UserError, one_line
from offsetjax.files import write_whole
from offsetjax.json_text import is_damaged, parse_object, signed

# The fields of config.noise that a calibration may fill in.
FILLED = ("noise.channel_strengths", "noise.spectrum", "noise.data_mean", "noise.data_mean_std")

_FORMAT = "offsetjax calibration 1"


@dataclass(frozen=True)
class Calibration:
    """The statistics of a data set's latents, times the scaling factor; and what they were reported for."""

    num_examples: int
    resolution: int  # of the pictures
    height: int  # of the latents
    width: int
    schedule: Mapping[str, Any]  # config.schedule
    target_terminal_snr: float  # τ
    mean: Float[np.ndarray, " c"]
    mean_variance: Float[np.ndarray, " c"]  # over pictures, of a channel's spatial mean
    frequency: Float[np.ndarray, " k"]  # cycles a latent pixel: 0, then the mean of each radial band
    power: Float[np.ndarray, "c k"]  # mean variance of a mode around the data's mean picture, orthonormal units


def summarise(
    mean: Complex[np.ndarray, "c h w2"], variance: Float[np.ndarray, "c h w2"], width: int, **about: Any
) -> Calibration:
    """The calibration of latents whose modes (their orthonormal `rfft2`) have this mean and variance over pictures.

    Args:
        about: `num_examples`, `resolution`, `schedule` and `target_terminal_snr`.
    """
    height = mean.shape[1]
    bands, frequency = radial_bands(height, width)
    return Calibration(
        height=height,
        width=width,
        mean=mean[:, 0, 0].real / math.sqrt(height * width),
        mean_variance=variance[:, 0, 0] / (height * width),
        frequency=frequency,
        power=band_means(variance, bands, width),
        **about,
    )


def radial_bands(height: int, width: int) -> tuple[Int[np.ndarray, "h w2"], Float[np.ndarray, " k"]]:
    """The radial band of each mode, and the mean frequency of each band; band 0 is f = 0 alone.

    The others are one frequency step of the grid wide, and from where that is finer an eighth of an octave.
    """
    radius = np.hypot(*frequencies(height, width))
    step = 1.0 / max(height, width)
    edges = [0.5 * step]
    while edges[-1] <= radius.max():
        edges.append(max(edges[-1] + step, edges[-1] * 2.0**0.125))
    bands = np.unique(np.digitize(radius, edges), return_inverse=True)[1].reshape(radius.shape)
    return bands, band_means(radius, bands, width)


def band_means(
    spectrum: Float[np.ndarray, "*c h w2"], bands: Int[np.ndarray, "h w2"], width: int
) -> Float[np.ndarray, "*c k"]:
    """The mean over the modes of each band, of which an entry of a half spectrum stands for one or two."""
    weight = (bands == np.arange(bands.max() + 1)[:, None, None]) * multiplicity(len(bands), width)
    return np.einsum("...hw,khw->...k", spectrum, weight) / weight.sum((1, 2))


def terminal_snr(process: Process) -> float:
    """The SNR of a pixel at the last timestep, in float64."""
    return float(process.snr(process.last_timestep))


def offset_strengths(
    calibration: Calibration, process: Process, target: float, pixels: int = 0, floor: Any = 1.0
) -> Float[np.ndarray, " c"]:
    """The least strength for each channel with which the terminal SNR of its mean is at most `target`.

    Args:
        pixels: of the latents that are noised; 0: of those that were measured. The variance of the mean hardly
            depends on it.
        floor: power of the mode f = 0 without an offset, a channel or for all; 1 for white noise.
    """
    pixels = pixels or calibration.height * calibration.width
    return np.sqrt(np.maximum(0.0, terminal_snr(process) * calibration.mean_variance / target - floor / pixels))


def noise_spectrum(calibration: Calibration, process: Process, target: float) -> tuple[str, ...]:
    """For each channel the formula of `S(f) = max(1, SNR_T P(f) / target)`, for `formula_spectrum`, to 6 digits."""
    # The first band's value begins half a step of the grid above f = 0: no mode of that grid mixes the two.
    half = 0.5 / max(calibration.height, calibration.width)
    places = np.insert(calibration.frequency, 1, half)
    powers = np.maximum(1.0, terminal_snr(process) * calibration.power / target)
    return tuple(interpolation(places, np.insert(each, 1, each[1])) for each in powers)


def interpolation(places: Float[np.ndarray, " k"], values: Float[np.ndarray, " k"]) -> str:
    """A formula in `f`, without the places inside of a level stretch, of which the powers under the floor make one."""
    is_level = np.diff(values) == 0
    kept = np.concatenate([[True], ~(is_level[:-1] & is_level[1:]), [True]])
    return f"interp(f, {_numbers(places[kept])}, {_numbers(values[kept])})"


def _numbers(values: Float[np.ndarray, " k"]) -> tuple[float, ...]:
    """Python's floats, rounded to 6 significant digits."""
    return tuple(float(f"{value:.6g}") for value in values)


def filled(
    noise: ConfigDict, calibration: Calibration, process: Process, resolution: int, channels: int, downscale: int
) -> ConfigDict:
    """The section `noise` of a config with what is empty in it and follows from the data, for the calibration's target.

    - `data_mean` and `data_mean_std` with an `adaptive_scale`, and nothing else;
    - `spectrum`, for spectral noise;
    - `channel_strengths`, for the other kinds, where neither they nor `offset_strength` are set.

    Args:
        resolution: of the training's pictures, in pixels.
        channels: of the latents.
        downscale: pixels a latent pixel, on a side.

    Raises:
        UserError: nothing is empty, nothing is needed, or the latents have another number of channels or another size.
    """
    if len(calibration.mean) != channels:
        raise UserError(
            f"config: noise.calibration = {noise.calibration!r} has {len(calibration.mean)} channels, but the latents "
            f"have {channels}; calibrate with this config"
        )
    fields: dict[str, tuple[Any, ...]] = {}
    given = [name for name in ("spectrum", "channel_strengths", "offset_strength") if noise[name]]
    if not given and not noise.adaptive_scale:
        compute = _spectrum if noise.kind == "spectral" else _strengths
        fields |= compute(noise, calibration, process, resolution, downscale)
    if noise.adaptive_scale and not noise.data_mean:
        mean, deviation = calibration.mean, np.sqrt(calibration.mean_variance)
        fields |= {"data_mean": _numbers(mean), "data_mean_std": _numbers(deviation)}
    if not fields:
        raise UserError(
            f"config: noise.calibration cannot apply: noise.{given[0]} is set, which leaves nothing for it to fill in; "
            "leave one of the two out"
        )
    noise = noise.copy_and_resolve_references()
    with noise.unlocked(), noise.ignore_type():  # unlocked: what is filled in is no statement
        for name, value in fields.items():
            noise[name] = value
    return noise


def _strengths(
    noise: ConfigDict, calibration: Calibration, process: Process, resolution: int, downscale: int
) -> dict[str, tuple[float, ...]]:
    side = resolution // downscale
    strengths, floor = recommended_strengths(noise, calibration, process, resolution, downscale)
    needed = offset_strengths(calibration, process, calibration.target_terminal_snr, side**2, floor)
    if np.any((needed > 0) & (strengths == 0)):
        raise UserError(
            f"config: noise.reference_resolution = {noise.reference_resolution} cannot apply with "
            f"noise.calibration: at data.resolution = {resolution} the mean needs an offset of "
            f"{needed[(needed > 0) & (strengths == 0)].max():.3g}, which no strength at that size has; leave it out"
        )
    present = mode_snr(side**2 * calibration.mean_variance, floor, terminal_snr(process))
    _check_needed(noise.calibration, calibration, bool(strengths.any()), present, "mean")
    return {"channel_strengths": _numbers(strengths)}


def recommended_strengths(
    noise: ConfigDict, calibration: Calibration, process: Process, resolution: int, downscale: int
) -> tuple[Float[np.ndarray, " c"], Float[np.ndarray, "#c"]]:
    """The strengths that a config needs for the calibration's target, and the power of f = 0 without them.

    They are in the terms of the section `noise`: for its size and `reference_resolution`, on top of its pyramid, and
    as much stronger as `random_strength` (E[c²] = c²/3) and `probability` weaken them.
    """
    side, made = resolution // downscale, make_noise(noise, process, downscale)
    spectrum = made.spectrum if made.kind == "pyramid" else None
    floor = np.ones(1) if spectrum is None else spectrum(side, side)[:, 0, 0]
    strengths = offset_strengths(calibration, process, calibration.target_terminal_snr, side**2, floor)
    return made.strengths_for(strengths, side, side), floor


def _spectrum(
    noise: ConfigDict, calibration: Calibration, process: Process, resolution: int, downscale: int
) -> dict[str, tuple[str, ...]]:
    side = resolution // downscale
    if (calibration.height, calibration.width) != (side, side):
        raise UserError(
            f"config: noise.calibration = {noise.calibration!r} is of {calibration.height}x{calibration.width} "
            f"latents, and a spectrum depends on their size, here {side}x{side}; calibrate at data.resolution = "
            f"{resolution}"
        )
    present = mode_snr(calibration.power, np.ones(1), terminal_snr(process))
    is_needed = bool(present.max() > calibration.target_terminal_snr)
    _check_needed(noise.calibration, calibration, is_needed, present, "most legible frequency")
    return {"spectrum": noise_spectrum(calibration, process, calibration.target_terminal_snr)}


def _check_needed(path: str, calibration: Calibration, is_needed: bool, present: np.ndarray, what: str) -> None:
    if not is_needed:
        raise UserError(
            f"config: noise.calibration = {path!r} has nothing to correct: by default the terminal "
            f"SNR of the {what} is {present.max():.3g}, and the file's target {calibration.target_terminal_snr:g}; "
            "leave it out, or calibrate with a lower --target_snr"
        )


def calibration_text(calibration: Calibration, strengths: Float[np.ndarray, " c"] | None) -> str:
    """The content of its file.

    Args:
        strengths: that are recommended, for whoever reads the file; None: there are none that suffice.
    """
    recommended = None
    if strengths is not None:
        recommended = {"offset_strength": max(_numbers(strengths)), "channel_strengths": _numbers(strengths)}
    content = {"format": _FORMAT, "recommended": recommended, **vars(calibration)}
    plain = parse_object(json.dumps(content, allow_nan=False, default=np.ndarray.tolist))
    return json.dumps(signed(plain), indent=1) + "\n"


def write_calibration(
    path: epath.PathLike, calibration: Calibration, strengths: Float[np.ndarray, " c"] | None
) -> None:
    """Writes the file; `strengths` as for `calibration_text`."""
    write_whole(path, calibration_text(calibration, strengths))


def read_calibration(path: epath.PathLike) -> Calibration:
    """What `write_calibration` wrote.

    Raises:
        UserError: no such file, or one that is damaged or something else.
    """
    remedy = "write it anew with `offsetjax calibrate`"
    try:
        content = parse_object(epath.Path(path).read_bytes())
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']!r}")
        calibration = _checked(content)
        if is_damaged(content):
            raise ValueError("it is damaged: its digest is not the one that was written")
        return calibration
    except OSError as error:
        raise UserError(f"noise.calibration: {path} cannot be read ({error.strerror}); {remedy}") from error
    except (ValueError, TypeError, KeyError) as error:  # half a file, one that was edited, or another's
        reason = f"no {error}" if isinstance(error, KeyError) else one_line(error)
        raise UserError(f"noise.calibration: {path} is no calibration ({reason}); {remedy}") from error


def _checked(content: Mapping[str, Any]) -> Calibration:
    counts: Any = {name: int(content[name]) for name in ("num_examples", "resolution", "height", "width")}
    arrays: Any = {name: np.array(content[name], float) for name in ("mean", "mean_variance", "frequency", "power")}
    target, channels, bands = float(content["target_terminal_snr"]), arrays["mean"].size, arrays["frequency"].size
    shapes = {"mean": (channels,), "mean_variance": (channels,), "frequency": (bands,), "power": (channels, bands)}
    for name, array in arrays.items():
        if array.shape != shapes[name] or array.size == 0 or not np.isfinite(array).all():
            raise ValueError(f"{name} has the shape {array.shape} or is not finite")
    is_power = min(arrays["mean_variance"].min(), arrays["power"].min()) >= 0
    is_frequency = bands > 1 and arrays["frequency"][0] == 0 and (np.diff(arrays["frequency"]) > 0).all()
    if not (is_power and is_frequency and min(counts.values()) >= 1 and 0 < target < math.inf):
        raise ValueError("its values are out of range")
    return Calibration(**counts, **arrays, schedule=dict(content["schedule"]), target_terminal_snr=target)
