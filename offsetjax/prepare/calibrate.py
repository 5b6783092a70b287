"""`offsetjax calibrate`: measures the data at each frequency, says what becomes of it, and recommends a noise.

Each picture is encoded once, without its flip, to the mean of its posterior; the mean and the variance over pictures of
each mode of the latents are gathered over all devices. `calibration.py` says what follows from them.
"""

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from etils import epath
from jaxtyping import Float
from ml_collections import ConfigDict

from offsetjax.data.buckets import Size
from offsetjax.data.source import open_data
from offsetjax.diffusion.calibration import (
    Calibration,
    band_means,
    calibration_text,
    filled,
    recommended_strengths,
    summarise,
    terminal_snr,
)
from offsetjax.diffusion.noise import PLAIN, Noise, make_noise
from offsetjax.diffusion.process import Process, mode_snr
from offsetjax.errors import UserError
from offsetjax.files import check_file, write_all
from offsetjax.models.task import task_of
from offsetjax.parallel import sharding
from offsetjax.plots import png
from offsetjax.prepare.latents import open_vae
from offsetjax.prepare.mode_snr import mode_snr_figure
from offsetjax.prepare.modes import Modes, measure, measure_sizes
from offsetjax.prepare.reach import Drawn, octaves, reach_advice, reach_figure, reach_table
from offsetjax.sampling.reach import drawing
from offsetjax.training.streams import batching_of, in_parts, limits_of, open_buckets, parts_of_a_size

_log = logging.getLogger("offsetjax")


def calibrate(config: ConfigDict, out: epath.PathLike, target: float = 0.1) -> Calibration:
    """Measures the data of a config; writes `out` for `noise.calibration`, `NAME.png` beside it, and prints a table.

    Args:
        out: a path that ends in .json; what is there is replaced.
        target: the terminal SNR that the mean of a channel may have.

    Raises:
        UserError: an argument out of range, an `out` that cannot be written, or a mistake in the config or the data.
    """
    out = epath.Path(out)
    if out.suffix != ".json":
        raise UserError(f"calibrate: --out={out} must end in .json")
    if not 0 < target < math.inf:
        raise UserError(f"calibrate: --target_snr={target} must be above 0")
    if not task_of(config).denoises:
        raise UserError(
            f"calibrate: task = {config.task!r} noises no latents; give the config of the diffusion training"
        )
    if jax.process_index() == 0:  # who writes it
        check_file("calibrate", out)
    mesh = sharding.make_mesh(config.mesh, config.train)
    source = open_data(config.data)
    if len(source) < 2:
        raise UserError(f"calibrate: {source.label} has one picture; a variance needs two or more")
    if config.data.cached_latents and source.cache.sizes:  # type: ignore[attr-defined]
        raise UserError(
            f"calibrate: {source.label} has latents of several sizes, and a calibration is of squares; give the "
            "pictures that they were made of, with data.cached_latents=False"
        )
    config, pipeline, params, _ = open_vae(config, source)
    config.sample.size = ""  # what is measured, and said of a sampler, is of squares
    # As much as the devices hold in training.
    batching = dataclasses.replace(
        batching_of(config), global_batch_size=config.train.global_batch_size // config.train.accumulate_steps
    )
    modes = measure(batching, pipeline, params, source, mesh)
    buckets, of_sizes = open_buckets(config, source), {}
    if buckets:
        batch_sizes = in_parts(buckets, parts_of_a_size(config))
        of_sizes = measure_sizes(batching, pipeline, params, source, mesh, batch_sizes, limits_of(config.data))
    if not (np.isfinite(modes.mean).all() and np.isfinite(modes.variance).all()):
        raise UserError("calibrate: the autoencoder's latents are not finite; check model.pretrained")
    calibration = summarise(
        modes.mean,
        modes.variance,
        config.data.resolution // pipeline.autoencoder.downscale,
        num_examples=len(source),
        resolution=config.data.resolution,
        schedule=config.schedule.to_dict(),
        target_terminal_snr=target,
    )
    if jax.process_index() == 0:
        resolution, downscale = config.data.resolution, pipeline.autoencoder.downscale
        process = pipeline.noising.process
        noise = configured_noise(config.noise, calibration, process, resolution, downscale)
        strengths, _ = recommended_strengths(config.noise, calibration, process, resolution, downscale)
        has_terminal_snr = terminal_snr(process) > 0
        if has_terminal_snr:
            for line in table(calibration, modes.variance, noise, strengths, process):
                _log.info("%s", line)
        drawn = Drawn(process, pipeline.noising.density, drawing(pipeline, config.sample, resolution))
        advice = reach_advice(drawn, calibration)
        if not has_terminal_snr:  # the strength goes by what the sampler returns; in the config's own terms too
            effective, size = np.full(1, advice.offset or 0.0), (calibration.height, calibration.width)
            strengths = make_noise(config.noise, process, downscale).strengths_for(effective, *size)
        suffices = has_terminal_snr or advice.offset is not None
        if suffices:  # of the channel that needs the most
            advice = dataclasses.replace(advice, offset=float(f"{strengths.max():.3g}"))
        recommended = _with_strength(config.noise, advice.offset or 0.0, process, downscale)
        for line in reach_table(drawn, calibration, modes.variance, noise, advice, recommended):
            _log.info("%s", line)
        for line in size_table(of_sizes, noise, process, downscale):
            _log.info("%s", line)
        pictures = {
            out.parent / f"{out.stem}.png": png(reach_figure(drawn, calibration, noise, recommended)),
            out.parent / f"{out.stem}_snr.png": png(mode_snr_figure(calibration, noise, recommended, process)),
        }
        write_all({**pictures, out: calibration_text(calibration, strengths if suffices else None)})
        use = "give it as noise.calibration; " if has_terminal_snr else ""
        _log.info("%s: %sthe figures are %s", out, use, " and ".join(map(str, pictures)))
    return calibration


def configured_noise(
    settings: ConfigDict, calibration: Calibration, process: Process, resolution: int, downscale: int
) -> Noise:
    """The noise of a training with this section `noise`, whose `calibration` will be this one."""
    if settings.calibration:
        try:
            settings = filled(settings, calibration, process, resolution, len(calibration.mean), downscale)
        except UserError as refusal:  # the training will say so too; what was measured is of use still
            _log.warning("%s; the tables show plain noise instead", refusal)
            return PLAIN
    noise = make_noise(settings, process, downscale)
    if noise.adaptive_scale and noise.data_mean is None:
        noise = dataclasses.replace(noise, data_mean=(calibration.mean, np.sqrt(calibration.mean_variance)))
    return noise


def _with_strength(settings: ConfigDict, strength: float, process: Process, downscale: int) -> Noise:
    """The config's noise with another strength of its offset; plain noise with it where the kind has none."""
    noise = settings.copy_and_resolve_references()
    noise.update(offset_strength=float(strength), channel_strengths=(), adaptive_scale=0.0, spectrum=())
    noise.kind = "offset" if noise.kind == "spectral" else noise.kind
    return make_noise(noise, process, downscale)


def table(
    calibration: Calibration,
    variance: Float[np.ndarray, "c h w2"],
    noise: Noise,
    strengths: Float[np.ndarray, " c"],
    process: Process,
) -> Iterator[str]:
    """The lines to print: a channel each, what is recommended, and a band of frequencies each."""
    height, width, snr = calibration.height, calibration.width, terminal_snr(process)
    target, pixels = calibration.target_terminal_snr, height * width
    yield (
        f"{calibration.num_examples} pictures of {calibration.resolution} px, latents of {height}x{width}; "
        f"the last timestep has an SNR of {snr:.5f} a pixel"
    )
    means = pixels * calibration.mean_variance
    configured = mode_snr(means, noise.power(height, width)[:, 0, 0], snr)
    yield f"{'':9}{'variance of':>12}   {'terminal SNR of the mean':^28}{'offset strength for':>22}"
    yield f"{'channel':>9}{'the mean':>12}{'plain noise':>15}{'this config':>14}{f'an SNR of {target:g}':>22}"
    rows = zip(calibration.mean_variance, mode_snr(means, np.ones(1), snr), configured, strengths, strict=True)
    for channel, (variance_of_mean, plain, present, strength) in enumerate(rows):
        yield f"{channel:9d}{variance_of_mean:12.4g}{plain:15.3g}{present:14.3g}{strength:22.4g}"
    if strengths.any():
        yield f"recommended: noise.offset_strength = {strengths.max():.3g}, the largest of the channels'"
    else:
        yield "recommended: noise.offset_strength = 0; without an offset the mean is below that SNR already"
    bands, names = octaves(height, width)
    power, noise_power = band_means(variance, bands, width), band_means(noise.power(height, width), bands, width)
    ratios = mode_snr(power, noise_power, snr)
    yield f"{'wavelength in':>16}{'power of':>12}{'power of':>12}   {'terminal SNR, this config':^30}"
    yield f"{'latent pixels':>16}{'the data':>12}{'the noise':>12}{'mean of channels':>20}{'worst channel':>15}"
    octave_rows = zip(names, power.mean(0), noise_power.mean(0), ratios.mean(0), ratios.max(0), strict=True)
    for name, data, noised, mean, worst in octave_rows:
        yield f"{name:>16}{data:12.3g}{noised:12.3g}{mean:20.3g}{worst:15.3g}"


def size_table(
    found: Mapping[Size, tuple[int, Modes]], noise: Noise, process: Process, downscale: int
) -> Iterator[str]:
    """A line for each size of a training's pictures: what its noise hides of a mean there, beside plain noise.

    Args:
        found: how many pictures each has, and their modes.
    """
    if not found:
        return
    snr = terminal_snr(process)
    plain_and_config = "terminal SNR of the mean" if snr > 0 else "t where the mean is decided"
    yield f"{'':>12}{'':10}{'variance of':>13}{'offset in':>11}   {plain_and_config:^28}"
    yield f"{'size':>12}{'pictures':>10}{'the mean':>13}{'effect':>11}{'plain noise':>15}{'this config':>14}"
    for size, (count, modes) in found.items():
        height, width = size.height // downscale, size.width // downscale
        means, power = modes.variance[:, 0, 0], noise.power(height, width)[:, 0, 0]
        if snr > 0:
            plain, present = (float(mode_snr(means, each, snr).max()) for each in (np.ones(1), power))
        else:  # where the SNR of the channel that is decided last is 1
            plain, present = (float((1 / (1 + np.sqrt(each / means))).max()) for each in (np.ones(1), power))
        variance, strength = float(means.max()) / (height * width), float(np.max(noise.strengths_at(height, width)))
        yield f"{size!s:>12}{count:10,d}{variance:13.4g}{strength:11.4g}{plain:15.3g}{present:14.3g}"
