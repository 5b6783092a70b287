"""Spectra: of multi-resolution noise, by building it; and formulas, which may come from a stranger's config."""

import jax
import numpy as np
import pytest
import torch

from offsetjax.diffusion.spectrum import (
    colour,
    formula_spectrum,
    frequencies,
    mean_power,
    multiplicity,
    pyramid_spectrum,
)


def test_the_pyramids_spectrum_is_that_of_noise_made_of_levels() -> None:
    size, canvas, discount, levels, count = 16, 256, 0.7, 3, 150
    generator = np.random.default_rng(0)
    window = np.hanning(canvas + 1)[:-1]
    total = np.zeros((size, size))
    pixel_variance = 0.0
    for _ in range(count):
        picture = generator.standard_normal((2, canvas, canvas)).sum(0)  # the base, and level 0, which is no coarser
        shift = 0.0
        for level in range(1, levels):
            factor = generator.uniform(2.0, 4.0) ** level
            if factor > size / 2:  # one coarse pixel: the same everywhere, and the last level
                shift += size**2 * discount ** (2 * level)
                break
            places = np.arange(canvas) / factor
            up = []
            for axis_places in (places + generator.uniform(), places + generator.uniform()):
                left = np.floor(axis_places).astype(int)
                matrix = np.zeros((canvas, left[-1] + 2))
                np.add.at(matrix, (np.arange(canvas), left), 1 - (axis_places - left))
                np.add.at(matrix, (np.arange(canvas), left + 1), axis_places - left)
                up.append(matrix)
            coarse = generator.standard_normal((up[0].shape[1], up[1].shape[1]))
            picture += discount**level * up[0] @ coarse @ up[1].T
        periodogram = np.abs(np.fft.fft2(picture * np.outer(window, window))) ** 2 / (window**2).sum() ** 2
        total += periodogram[:: canvas // size, :: canvas // size]
        total[0, 0] += shift
        pixel_variance += (picture**2).mean() + shift / size**2
    measured = total / pixel_variance
    half = pyramid_spectrum(size, size, discount, levels)
    expected = np.concatenate([half, half[:, 1 : size // 2][:, ::-1]], 1)
    radius = np.rint(size * np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))).astype(int)
    for band in range(9):
        inside = radius == band
        error = 4 / np.sqrt(count * inside.sum()) * 1.5 + 0.03  # r varies; the window widens a peak
        assert measured[inside].mean() == pytest.approx(expected[inside].mean(), rel=error), band
    assert expected[0, 0] > 10 * expected[size // 2, size // 2]


@pytest.mark.parametrize(("discount", "levels"), [(0.3, 6), (0.8, 6), (0.8, 10)])
def test_the_pyramids_power_is_that_of_the_loop_that_others_run(discount: float, levels: int) -> None:
    """J. Whitaker's loop with PyTorch's own up-sampling, which ends at the first level of one pixel."""
    size, draws, channels = 32, 400, 32
    generator, power = torch.Generator().manual_seed(0), np.zeros((size, size // 2 + 1))
    for _ in range(draws):
        noise = torch.randn(1, channels, size, size, generator=generator)
        for level in range(levels):
            ratio = 2 + 2 * torch.rand(1, generator=generator).item()
            side = max(1, int(size / ratio**level))
            coarse = torch.randn(1, channels, side, side, generator=generator)
            noise += discount**level * torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")
            if side == 1:
                break
        power += (np.abs(np.fft.rfft2(noise[0].numpy(), norm="ortho")) ** 2).mean(0) / draws
    power /= mean_power(power, size)
    ours = pyramid_spectrum(size, size, discount, levels)
    assert ours[0, 0] == pytest.approx(power[0, 0], rel=0.1)
    fy, fx = frequencies(size, size)
    waves = size * np.hypot(fy, fx)
    # Theirs is not periodic: its levels end at the latent's edges, which widens the longest waves a little.
    for low, high, error in ((0.5, 1.5, 0.2), (1.5, 4, 0.12), (4, 8, 0.05), (8, 16, 0.05)):
        band = (waves > low) & (waves <= high)
        assert ours[band].mean() == pytest.approx(power[band].mean(), rel=error), (low, high)


@pytest.mark.parametrize("size", [(8, 8), (64, 64), (7, 12), (9, 5), (1, 16)])
@pytest.mark.parametrize(("discount", "levels"), [(0.3, 6), (0.9, 10), (0.5, 1), (0.5, 0)])
def test_pyramid_noise_has_variance_1_a_pixel(size: tuple[int, int], discount: float, levels: int) -> None:
    spectrum = pyramid_spectrum(*size, discount, levels)
    plane = np.zeros(size)  # Parseval: the variance of a pixel is the mean over the whole plane of frequencies
    plane[:, : spectrum.shape[1]] = spectrum
    for y in range(size[0]):
        for x in range(spectrum.shape[1], size[1]):
            plane[y, x] = spectrum[-y % size[0], size[1] - x]
    assert plane.mean() == pytest.approx(1.0, rel=1e-9)
    assert mean_power(spectrum, size[1]) == pytest.approx(1.0, rel=1e-9)
    assert multiplicity(*size).sum() == size[0] * size[1]
    if levels < 2:
        np.testing.assert_allclose(spectrum, 1.0)


@pytest.mark.parametrize("size", [(8, 8), (7, 12), (12, 7)])
def test_colouring_multiplies_each_mode(size: tuple[int, int]) -> None:
    white = np.random.default_rng(0).standard_normal((2, *size))
    fy, fx = np.fft.fftfreq(size[0])[:, None], np.fft.fftfreq(size[1])[None]
    root = np.sqrt(1 + 3 * np.exp(-8 * np.hypot(fy, fx)))
    expected = np.fft.ifft2(np.fft.fft2(white) * root)
    assert np.abs(expected.imag).max() < 1e-12
    coloured = jax.jit(colour)(white.astype(np.float32), root[:, : size[1] // 2 + 1].astype(np.float32))
    np.testing.assert_allclose(coloured, expected.real, atol=1e-5)


@pytest.mark.parametrize(
    ("formula", "python"),
    [
        ("1", lambda f, n: np.ones_like(f)),
        (" 1 + 0.02 / (f + 0.01) ** 2", lambda f, n: 1 + 0.02 / (f + 0.01) ** 2),
        ("where(f == 0, 1 + 0.01 * N, 1)", lambda f, n: np.where(f == 0, 1 + 0.01 * n, 1)),
        ("where(f == 0, 2, 1 / f)", lambda f, n: np.where(f == 0, 2, 1 / np.maximum(f, 1e-9))),
        ("interp(f, (0, 0.2, 0.8), (9, 1, 0.5))", lambda f, n: np.interp(f, [0, 0.2, 0.8], [9, 1, 0.5])),
        ("exp(-pi * f) + maximum(f, 0.1) - minimum(f, 0.1)", lambda f, n: np.exp(-np.pi * f) + np.abs(f - 0.1)),
        ("sqrt(abs(-f)) + log(2 + f)", lambda f, n: np.sqrt(f) + np.log(2 + f)),
    ],
)
@pytest.mark.parametrize("size", [(8, 8), (5, 12)])
def test_a_formula_is_the_arithmetic_of_its_frequency(formula: str, python: object, size: tuple[int, int]) -> None:
    fy, fx = np.fft.fftfreq(size[0])[:, None], np.fft.rfftfreq(size[1])[None]
    np.testing.assert_allclose(formula_spectrum(formula, *size), python(np.hypot(fy, fx), size[0] * size[1]))


NO_ARITHMETIC = (
    "__import__('os')", "__import__('os').system('true')", "f.real", "f.__class__", "f[0]", "open('x')", "eval('1')",
    "(lambda: f)()", "[x for x in f]", "f if f else 1", "f := 2", "f and 1", "'a'", "1j", "g", "f(1)", "sin(f)",
    "import os", "1; 2", "*f", "exp(*f)", "exp(x=f)", "where(f > 0 > 1, 1, 2)",
)  # fmt: skip
MALFORMED = ("", "(", "f f", "1 +", "f\0", "interp(f, (0, 1), (1,))", "where(f)", "nan", "1" + "0" * 500)
NO_POWER = ("-1", "f - 0.1", "log(0)", "log(f)", "1 / f", "0 / 0", "1 / 0", "0", "0 * f", "1e308 * 10", "9**9**9**9")
DEEP = [
    pytest.param("-" * 3000 + "f", id="deep"),
    pytest.param("1" + " + 1" * 5000, id="long"),
    *(
        "exp(f, f)",
        "minimum(f, 1, f)",
        "interp(f, (0.5, 0.1), (1, 2))",
        "interp(f, (0, 1), (1, 2, 3))",
        "(1, 2, 3, 4, 5)",
    ),
]


@pytest.mark.parametrize("formula", [*NO_ARITHMETIC, *MALFORMED, *NO_POWER, *DEEP])
def test_a_formula_that_is_malformed_malicious_or_no_power_is_refused(formula: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        formula_spectrum(formula, 8, 8)
