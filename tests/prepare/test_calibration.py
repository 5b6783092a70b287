"""What the data says about the noise that it needs: measured once over all pictures, kept in a file, filled in."""

import dataclasses
import json
import logging
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from offsetjax.cli import main
from offsetjax.config import default_config, flatten
from offsetjax.config.checks import validate
from offsetjax.data.buckets import Limits, Size, square
from offsetjax.data.images import resize_and_crop
from offsetjax.data.source import open_source
from offsetjax.diffusion.calibration import (
    Calibration,
    band_means,
    noise_spectrum,
    offset_strengths,
    radial_bands,
    read_calibration,
    summarise,
    write_calibration,
)
from offsetjax.diffusion.noise import Noise, make_noise
from offsetjax.diffusion.process import make_process, mode_snr
from offsetjax.diffusion.spectrum import formula_spectrum
from offsetjax.errors import UserError
from offsetjax.models.encode import to_unit_range
from offsetjax.models.resolve import calibrated
from offsetjax.models.trained import read_config
from offsetjax.parallel import sharding
from offsetjax.parallel.sharding import mesh_of
from offsetjax.prepare.calibrate import calibrate, size_table
from offsetjax.prepare.latents import open_vae
from offsetjax.prepare.modes import measure, measure_sizes
from offsetjax.train import train
from offsetjax.training.setup import open_run
from offsetjax.training.streams import batching_of
from tests.data.shapes import pictures_of_shapes
from tests.tiny import build_data, quick_compilation, tiny_config

COUNT = 21  # no multiple of a batch of 8
SCHEDULE = make_process(default_config().schedule)
TERMINAL_SNR = 0.0046817  # of Stable Diffusion's schedule: √ᾱ_T = 0.0682646
TARGET = 2e-4  # below the terminal SNR of all four channels of a tiny autoencoder


def _calibration(size: int = 16, target: float = 0.1, **changes: Any) -> Calibration:
    """Of four channels with a power that falls with frequency, the last one's mean fixed but for a hair."""
    power = np.array([1.0, 0.5, 0.2, 0.1])[:, None] / np.maximum(radial_bands(size, size)[1], 0.5 / size) ** 2
    mean_variance = np.array([0.9, 0.5, 0.2, 1e-9])
    power[:, 0] = size**2 * mean_variance
    values: dict[str, Any] = {
        "num_examples": 100,
        "resolution": 8 * size,
        "height": size,
        "width": size,
        "schedule": default_config().schedule.to_dict(),
        "target_terminal_snr": target,
        "mean": np.array([0.5, -1.0, 0.0, 2.0]),
        "mean_variance": mean_variance,
        "frequency": radial_bands(size, size)[1],
        "power": power,
    }
    return Calibration(**{**values, **changes})


def _config(path: pathlib.Path | str, **changes: Any) -> ConfigDict:
    """A config of 16x16 latents."""
    config = default_config()
    config.data.resolution, config.noise.calibration = 128, str(path)
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    validate(config)
    return config


@pytest.fixture
def file(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "a file.json"
    write_calibration(path, _calibration(), None)
    return path


@pytest.mark.parametrize(("height", "width"), [(16, 16), (12, 9)])
def test_a_known_spectrum_is_read_off(height: int, width: int) -> None:
    spectrum = formula_spectrum("0.2 + 0.05 / (f + 0.05) ** 2", height, width)
    rng = np.random.default_rng(0)
    white = rng.normal(size=(4000, 2, height, width))
    picture = 30.0 * rng.normal(size=(2, height, width))  # the same in every example: no part of the variance
    latents = np.fft.irfft2(np.fft.rfft2(white) * np.sqrt(spectrum), s=(height, width)) + picture
    modes = np.fft.rfft2(latents, norm="ortho")
    about: dict[str, Any] = {"num_examples": 4000, "resolution": 0, "schedule": {}, "target_terminal_snr": 0.1}
    found = summarise(modes.mean(0), modes.var(0), width, **about)
    bands, frequency = radial_bands(height, width)
    assert frequency[0] == 0 and (bands == 0).sum() == 1 and 1 / max(height, width) <= frequency[1]
    np.testing.assert_allclose(found.power, [band_means(spectrum, bands, width)] * 2, rtol=0.1)
    np.testing.assert_allclose(found.mean, latents.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(found.mean_variance, latents.mean((2, 3)).var(0), rtol=1e-9)
    # Each of the N modes is in one band: the powers, by their numbers of modes, give the variance of a pixel.
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    edges = (frequency[1:] + frequency[:-1]) / 2
    counts = [((bands == band) * _times(width)).sum() for band in range(len(frequency))]
    assert counts[:2] == [1, (radius < edges[1]).sum() - 1] and sum(counts) == height * width
    np.testing.assert_allclose(found.power @ counts / (height * width), latents.var(0).mean((1, 2)), rtol=1e-9)


def _times(width: int) -> np.ndarray:
    """How often each column of a half spectrum is in the whole one."""
    return np.array([1 if column in (0, width / 2) else 2 for column in range(width // 2 + 1)])


@pytest.mark.parametrize("target", [0.01, 0.1])
@pytest.mark.parametrize("size", [8, 16, 64])
def test_the_strengths_bring_the_terminal_snr_of_the_mean_to_the_target(size: int, target: float) -> None:
    calibration = _calibration()
    strengths = offset_strengths(calibration, SCHEDULE, target, pixels=size**2)
    power = Noise("offset", strengths).power(size, size)[:, 0, 0]
    ratio = TERMINAL_SNR * size**2 * calibration.mean_variance / power
    np.testing.assert_allclose(ratio[strengths > 0], target, rtol=1e-4)
    assert (ratio <= target * 1.0001).all()
    assert strengths[-1] == 0 < strengths[0]
    by_hand = np.sqrt(TERMINAL_SNR * 0.9 / target - 1 / size**2)
    np.testing.assert_allclose(strengths[0], by_hand, rtol=1e-4)


def test_the_spectrum_brings_every_band_to_the_target() -> None:
    calibration, target = _calibration(), 0.02
    bands, _ = radial_bands(16, 16)
    formulas = noise_spectrum(calibration, SCHEDULE, target)
    power = np.stack([formula_spectrum(formula, 16, 16) for formula in formulas])
    np.testing.assert_allclose(power[:3, 0, 0], TERMINAL_SNR * 256 * calibration.mean_variance[:3] / target, rtol=1e-4)
    ratio = mode_snr(calibration.power, band_means(power, bands, 16), TERMINAL_SNR)
    is_coloured = TERMINAL_SNR * calibration.power > target
    assert is_coloured.any() and not is_coloured.all()
    np.testing.assert_allclose(ratio[is_coloured], target, rtol=0.15)  # between bands the formula is linear
    np.testing.assert_allclose(power[:, 0, 1], TERMINAL_SNR * calibration.power[:, 1] / target, rtol=1e-4)
    assert power.min() == 1.0 == power[3, 0, 0]


@pytest.mark.parametrize("kind", ["offset", "adjusted", "pyramid"])
@pytest.mark.parametrize(("resolution", "reference"), [(128, 0), (256, 0), (128, 512), (256, 128)])
def test_strengths_are_filled_in_for_each_kind_and_size(
    file: pathlib.Path, kind: str, resolution: int, reference: int
) -> None:
    pyramid = {"noise__pyramid_discount": 0.3, "noise__pyramid_levels": 4} if kind == "pyramid" else {}
    config = _config(
        file, noise__kind=kind, data__resolution=resolution, noise__reference_resolution=reference, **pyramid
    )
    filled = calibrated(config)
    validate(filled)
    assert config.noise.channel_strengths == ()
    changed = {path for (path, new), (_, old) in zip(flatten(filled), flatten(config), strict=True) if new != old}
    assert changed == {"noise.channel_strengths"}
    side = resolution // 8
    power = make_noise(filled.noise, SCHEDULE, 8).power(side, side)[:, 0, 0]
    np.testing.assert_allclose(TERMINAL_SNR * side**2 * _calibration().mean_variance[:3] / power[:3], 0.1, rtol=1e-4)


def test_a_reference_at_which_the_mean_is_hidden_by_plain_noise_is_refused(file: pathlib.Path) -> None:
    with pytest.raises(
        UserError, match=r"reference_resolution = 64 .* which no strength at that size has; leave it out"
    ):
        calibrated(_config(file, data__resolution=256, noise__reference_resolution=64))


def test_a_spectrum_is_filled_in(file: pathlib.Path) -> None:
    config = calibrated(_config(file, noise__kind="spectral"))
    validate(config)
    assert config.noise.spectrum == noise_spectrum(_calibration(), SCHEDULE, 0.1)
    assert config.noise.channel_strengths == ()


def test_the_data_mean_is_filled_in_for_an_adaptive_strength(file: pathlib.Path) -> None:
    config = calibrated(_config(file, noise__offset_strength=0.1, noise__adaptive_scale=0.2))
    validate(config)
    assert config.noise.data_mean == (0.5, -1.0, 0.0, 2.0)
    np.testing.assert_allclose(config.noise.data_mean_std, np.sqrt(_calibration().mean_variance), rtol=1e-5)
    assert config.noise.channel_strengths == () and config.noise.offset_strength == 0.1
    alone = calibrated(_config(file, noise__adaptive_scale=0.2)).noise
    assert alone.data_mean == config.noise.data_mean
    assert alone.channel_strengths == (), "an adaptive strength may stand alone"


@pytest.mark.parametrize(
    ("changes", "resolution"),
    [
        ({}, 128),
        ({"noise__reference_resolution": 512}, 128),
        ({"noise__random_strength": True, "noise__probability": 0.25}, 128),
        ({"noise__kind": "pyramid", "noise__pyramid_discount": 0.3, "noise__pyramid_levels": 4}, 128),
        ({"noise__kind": "adjusted"}, 128),
        ({}, 512),
    ],
)
def test_what_is_filled_in_brings_the_expected_terminal_snr_to_the_target(
    file: pathlib.Path, changes: dict[str, Any], resolution: int
) -> None:
    config = calibrated(_config(file, data__resolution=resolution, **changes))
    validate(config)
    schedule, side = make_process(config.schedule), resolution // 8
    power = make_noise(config.noise, schedule, downscale=8).power(side, side)[:3, 0, 0]
    snrs = TERMINAL_SNR * side**2 * _calibration().mean_variance[:3] / power  # the last channel has none to mend
    np.testing.assert_allclose(snrs, 0.1, rtol=1e-3)


def test_a_config_without_calibration_stays_as_it_is() -> None:
    config = _config("", noise__offset_strength=0.1)
    assert calibrated(config) is config


@pytest.mark.parametrize(
    ("measured", "changes", "words"),
    [
        ({}, {"noise__channel_strengths": (0.1,) * 4}, "noise.channel_strengths is set, which leaves nothing"),
        ({}, {"noise__kind": "spectral", "noise__spectrum": ("1",)}, "noise.spectrum is set, which leaves nothing"),
        ({"target": 2.0}, {}, "the terminal SNR of the mean is 1.08, and the file's target 2;"),
        ({"target": 9.0}, {"noise__kind": "spectral"}, "the terminal SNR of the most legible frequency is 1.08,"),
        ({"size": 32}, {"noise__kind": "spectral"}, "32x32 latents, and a spectrum depends on their size, here 16x16;"),
        ({"power": np.ones((2, 12)), "mean": np.ones(2), "mean_variance": np.ones(2)}, {}, "has 2 channels"),
    ],
)
def test_a_calibration_that_cannot_apply_is_refused(
    tmp_path: pathlib.Path, measured: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    write_calibration(tmp_path / "c.json", _calibration(**measured), None)
    config = _config(tmp_path / "c.json", **changes)
    with pytest.raises(UserError) as caught:
        calibrated(config)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_is_read_as_it_was_written(file: pathlib.Path) -> None:
    written = _calibration(target=0.25)
    write_calibration(file, written, offset_strengths(written, SCHEDULE, 0.25))
    found = read_calibration(file)
    for name, value in vars(written).items():
        np.testing.assert_array_equal(getattr(found, name), value)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    strengths = json.loads(file.read_text())["recommended"]["channel_strengths"]
    np.testing.assert_allclose(strengths, offset_strengths(written, SCHEDULE, 0.25), rtol=1e-5)


def test_a_file_recommends_nothing_where_no_strength_suffices(file: pathlib.Path) -> None:
    write_calibration(file, _calibration(), None)
    assert json.loads(file.read_text())["recommended"] is None
    assert read_calibration(file).target_terminal_snr == _calibration().target_terminal_snr


def _without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: {key: value for key, value in content.items() if key != name}


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: [],
        lambda content: {},
        lambda content: {**content, "format": "another"},
        *(_without(name) for name in ("num_examples", "schedule", "mean", "frequency", "power")),
        lambda content: {**content, "mean": [0.0]},
        lambda content: {**content, "mean": "a", "mean_variance": None},
        lambda content: {**content, "power": [[0.0]]},
        lambda content: {**content, "power": np.full_like(content["power"], np.nan).tolist()},
        lambda content: {**content, "mean_variance": [-1.0] * 4},
        lambda content: {**content, "frequency": content["frequency"][::-1]},
        lambda content: {**content, "target_terminal_snr": 0},
        lambda content: {**content, "height": 0},
        lambda content: {**content, "mean": [value + 0.5 for value in content["mean"]]},  # by its digest alone
    ],
)
def test_a_damaged_or_foreign_file_is_refused(file: pathlib.Path, damage: Callable[[dict[str, Any]], Any]) -> None:
    file.write_text(json.dumps(damage(json.loads(file.read_text()))))
    _refuses_to_read(file, "is no calibration")


def test_an_unreadable_file_is_refused(file: pathlib.Path) -> None:
    _refuses_to_read(file.parent, "cannot be read")
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"\xff\xfe\x00", Image.new("L", (2, 2)).tobytes()):
        file.write_bytes(damaged)
        _refuses_to_read(file, "is no calibration")
    file.unlink()
    _refuses_to_read(file, "No such file")


def _refuses_to_read(path: pathlib.Path, words: str) -> None:
    with pytest.raises(UserError) as caught:
        read_calibration(path)
    error = str(caught.value)
    assert words in error and str(path) in error and "offsetjax calibrate" in error and "\n" not in error


# The command, on a data set of 21 pictures.


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module", autouse=True)
def _quickly(base: pathlib.Path) -> Iterator[None]:
    with quick_compilation(base):
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return build_data(tmp_path_factory.mktemp("calibrated"), COUNT)


@pytest.fixture(scope="module")
def measured(data: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """What the command wrote, on a mesh of 2 x 4, for a scaling factor of 0.5."""
    out = tmp_path_factory.mktemp("measured") / "a folder" / "tiny.json"
    calibrate(_tiny(data, mesh__data=2, mesh__fsdp=4), out, TARGET)
    return out


def _tiny(data: pathlib.Path, **changes: Any) -> ConfigDict:
    changes = {"model__vae__scaling_factor": 0.5, "noise__offset_strength": 0.0, **changes}
    return tiny_config(data, **changes)


@pytest.fixture(scope="module")
def modes(data: pathlib.Path) -> np.ndarray:
    """The modes of all latents in the order of the data, computed by themselves: `[n, c, h, w2]`."""
    config, pipeline, params, _ = open_vae(_tiny(data), open_source(data))
    source = open_source(data)
    pixels = np.stack([resize_and_crop(source[i].pixels(), square(16)) for i in range(COUNT)])
    latents = pipeline.autoencoder.encode(params, pixels.transpose(0, 3, 1, 2) / np.float32(127.5) - 1)[0]
    return np.fft.rfft2(np.asarray(latents, np.float64) * config.model.vae.scaling_factor, norm="ortho")


def test_the_command_measures_each_picture_once(measured: pathlib.Path, modes: np.ndarray) -> None:
    found = read_calibration(measured)
    assert (found.num_examples, found.resolution, found.height, found.width) == (COUNT, 16, 8, 8)
    assert found.target_terminal_snr == TARGET and found.schedule["beta_end"] == 0.012
    np.testing.assert_allclose(found.mean, modes[:, :, 0, 0].real.mean(0) / 8, rtol=1e-3)
    np.testing.assert_allclose(found.mean_variance, (modes[:, :, 0, 0].real / 8).var(0), rtol=1e-3)
    np.testing.assert_allclose(found.power[:, 0], modes[:, :, 0, 0].real.var(0), rtol=1e-3)
    # The modes about one step of the grid from 0: (0, 1), (1, 1), (-1, 1) and (1, 0), and as many opposite to them.
    ring = modes.var(0)[:, [0, 1, -1, 1], [1, 1, 1, 0]].mean(1)
    np.testing.assert_allclose(found.power[:, 1], ring, rtol=1e-3)
    np.testing.assert_allclose(found.frequency[1], (1 + np.sqrt(2)) / 2 / 8)
    with Image.open(measured.with_suffix(".png")) as image:
        assert image.width > 800
    assert sorted(path.name for path in measured.parent.iterdir()) == ["tiny.json", "tiny.png", "tiny_snr.png"]


def test_one_device_measures_what_eight_do(data: pathlib.Path, measured: pathlib.Path) -> None:
    source = open_source(data)
    config, pipeline, params, _ = open_vae(_tiny(data, train__accumulate_steps=2), source)  # in batches of 4
    mesh = sharding.mesh_of(data=1, fsdp=1)
    batching = dataclasses.replace(batching_of(config), global_batch_size=4)
    found = measure(batching, pipeline, params, source, mesh)
    assert mesh.size == 1 and jax.device_count() == 8
    bands, _ = radial_bands(8, 8)
    eight = read_calibration(measured)
    np.testing.assert_allclose(band_means(found.variance, bands, 8), eight.power, rtol=1e-5)
    np.testing.assert_allclose(found.mean[:, 0, 0].real / 8, eight.mean, rtol=1e-5)


def test_the_table_says_what_snrs_and_what_mends_it(
    data: pathlib.Path, measured: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "offsetjax"):
        found = calibrate(_tiny(data, noise__offset_strength=0.3), tmp_path / "c.json", TARGET)
    np.testing.assert_array_equal(found.power, read_calibration(measured).power)
    lines = [line.split() for line in caplog.text.splitlines()]
    rows = {line[-5]: [float(number) for number in line[-4:]] for line in lines if line[-5:-4] in (["0"], ["3"])}
    variance, strengths = found.mean_variance, offset_strengths(found, SCHEDULE, TARGET)
    for channel in (0, 3):
        plain = TERMINAL_SNR * 64 * variance[channel]
        expected = [variance[channel], plain, plain / (1 + 0.3**2 * 64), strengths[channel]]
        np.testing.assert_allclose(rows[str(channel)], expected, rtol=1e-2)
    assert f"recommended: noise.offset_strength = {strengths.max():.3g}" in caplog.text
    whole = next(line for line in caplog.text.splitlines() if "whole picture" in line).split()[-4:]
    snr = TERMINAL_SNR * 64 * variance / (1 + 0.3**2 * 64)
    expected = [64 * variance.mean(), 1 + 0.3**2 * 64, snr.mean(), snr.max()]
    np.testing.assert_allclose([float(number) for number in whole], expected, rtol=1e-2)


@pytest.mark.parametrize(
    ("changes", "target", "pattern"),
    [
        # The file that is being made is the one that the training will read.
        ({"noise__kind": "spectral", "noise__calibration": "c.json"}, TARGET, r"whole picture .* 0\.0002 +0\.0002\n"),
        ({"noise__calibration": "c.json"}, 0.1, r"is 0\.000593, and the file's target 0\.1;.*plain noise instead"),
        (
            {"schedule__zero_terminal_snr": True, "schedule__prediction_type": "v_prediction"},
            TARGET,
            r"recommended: plain noise and more sample\.num_steps: 2 steps return 2\d% of the spread",
        ),
        (
            {"schedule__process": "flow", "sample__sampler": "euler", "sample__num_steps": 50},
            TARGET,
            r"recommended: plain noise is good enough: 50 steps return 9\d%",
        ),
        ({"data__buckets": ("24x16",)}, TARGET, r"latents of 8x8;"),  # what is measured is squares
        (
            {"model__vae__scaling_factor": 0.0, "noise__adaptive_scale": 0.2, "noise__calibration": "c.json"},
            TARGET,
            r"whole picture +\S+ +1\.0\d+ ",  # of the noise, for the means that were measured
        ),
    ],
)
def test_configs_of_all_kinds_are_measured(
    data: pathlib.Path,
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, Any],
    target: float,
    pattern: str,
) -> None:
    with caplog.at_level(logging.INFO, "offsetjax"):
        found = calibrate(_tiny(data, **changes), tmp_path / "c.json", target)
    assert re.search(pattern, caplog.text), caplog.text
    assert (tmp_path / "c.png").exists()
    if "model__vae__scaling_factor" in changes:  # latents that have been given a mean of 0 and a deviation of 1
        np.testing.assert_allclose(found.mean, 0.0, atol=0.2)


def test_a_training_takes_its_strengths_from_the_file(
    data: pathlib.Path, measured: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "moved.json"
    file.write_bytes(measured.read_bytes())
    # A learning rate that does not depend on the number of steps: the second training need not be compiled.
    config = _tiny(data, noise__calibration=str(file), train__steps=2, optimizer__decay="constant")
    train(config, tmp_path / "run")
    stored = read_config(tmp_path / "run")
    expected = offset_strengths(read_calibration(file), SCHEDULE, TARGET)
    np.testing.assert_allclose(stored.noise.channel_strengths, expected, rtol=1e-5)
    assert stored.noise.calibration == str(file) and min(expected) > 0
    source = open_source(data)
    assert open_run(config, tmp_path / "run", source).config.noise == stored.noise
    other = read_calibration(file)
    write_calibration(file, Calibration(**{**vars(other), "mean_variance": 2 * other.mean_variance}), None)
    with pytest.raises(UserError, match=r"noise.channel_strengths = .* was begun with"):
        open_run(config, tmp_path / "run", source)
    file.unlink()
    config.train.steps = 3
    train(config, tmp_path / "run")
    assert read_config(tmp_path / "run").noise == stored.noise
    assert (tmp_path / "run" / "checkpoints" / "3").is_dir()
    config.noise.calibration = ""  # as if it had not been given
    with pytest.raises(UserError, match=r"noise.channel_strengths = \(\), but .* was begun with"):
        open_run(config, tmp_path / "run", source)


def test_a_training_without_its_file_does_not_begin(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        open_run(_tiny(data, noise__calibration=str(tmp_path / "none.json")), tmp_path / "run", open_source(data))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--out={out}.txt",), "must end in .json"),
        (("--out={out}.json", "--target_snr=0"), "--target_snr=0.0 must be above 0"),
        (("--out={out}.json", "--target_snr=nan"), "--target_snr=nan must be above 0"),
        (("--out={out}.json", "--target=1"), "unknown argument --target=1;"),
        (("--out={out}.json", "--config.noise_offset=1"), "it is called noise.offset_strength here"),
        (("--out={out}.json", "--config.task=autoencoder", "--config.noise.offset_strength=0"), "noises no latents"),
        (("--out={out}.json", "--config.data.path={out}"), "holds no data set"),
        (("--out={out}.json", "--config.data.split=train[:1]"), "a variance needs two or more"),
    ],
)
def test_a_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: pathlib.Path,
    data: pathlib.Path,
    arguments: tuple[str, ...],
    words: str,
) -> None:
    file = tmp_path / "tiny.py"
    file.write_text(
        f"from tests.tiny import tiny_config\n\n\ndef get_config():\n    return tiny_config({str(data)!r})\n"
    )
    given = [argument.format(out=tmp_path / "out") for argument in arguments]
    assert main(["calibrate", f"--config={file}", *given]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("offsetjax: error: ") and words in error[-1]
    assert len(error) == 1
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("out", "words"), [("a file/c.json", "a file is a file, where"), ("folder.json", "folder.json is a folder, where")]
)
def test_an_out_that_cannot_be_is_told_before_the_data_are_read(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, out: str, words: str
) -> None:
    monkeypatch.setattr("offsetjax.prepare.calibrate.open_data", None)
    (tmp_path / "a file").touch()
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match=rf"^calibrate: {tmp_path}/{words} --out needs .*; give another --out$"):
        calibrate(_tiny(tmp_path), tmp_path / out)


def test_each_size_has_its_own_modes(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = pictures_of_shapes(tmp_path_factory.getbasetemp())
    config, source = tiny_config(path), open_source(path)
    _, pipeline, params, _ = open_vae(config, source)
    sizes, limits = {Size(16, 16): 8, Size(24, 16): 4, Size(16, 24): 4}, Limits(max_aspect=2.0)
    mesh = mesh_of(data=1, fsdp=1)
    found = measure_sizes(batching_of(config), pipeline, params, source, mesh, sizes, limits)
    assert {str(size): count for size, (count, _) in found.items()} == {"16x24": 5, "16x16": 10, "24x16": 15}
    wide = [source[number].view(Size(24, 16), False)["pixels"] for number in range(35) if number % 7 in (1, 3, 4)]
    latents = jax.jit(pipeline.autoencoder.encode)(params, to_unit_range(np.stack(wide)))[0]
    modes = np.fft.rfft2(np.asarray(latents, np.float64), norm="ortho")
    measured = found[Size(24, 16)][1]
    np.testing.assert_allclose(measured.mean, modes.mean(0), atol=1e-4)
    np.testing.assert_allclose(measured.variance, modes.var(0), rtol=1e-3, atol=1e-6)
    process = make_process(config.schedule, 2)
    lines = list(size_table(found, make_noise(config.noise, process, 2), process, 2))
    assert [line.split()[:2] for line in lines[2:]] == [["16x24", "5"], ["16x16", "10"], ["24x16", "15"]]
    variance = modes.var(0)[:, 0, 0].max() / (8 * 12)
    assert float(lines[4].split()[2]) == pytest.approx(variance, rel=2e-3) and float(lines[4].split()[3]) == 0.1
    assert list(size_table({}, make_noise(config.noise, process, 2), process, 2)) == []
