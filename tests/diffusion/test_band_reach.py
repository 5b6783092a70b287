"""What comes back of each band, against the algebra of brightness, and that what is recommended does what it says."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from offsetjax.diffusion.band_reach import ENOUGH, SEEN, Bands, band_reach, remedy
from offsetjax.diffusion.calibration import band_means, radial_bands
from offsetjax.diffusion.density import Density
from offsetjax.diffusion.flow import Flow
from offsetjax.diffusion.noise import PLAIN, Noise
from offsetjax.diffusion.spectrum import formula_spectrum
from offsetjax.diffusion.spread import Drawing, reach
from offsetjax.diffusion.variance_preserving import variance_preserving
from tests.diffusion.offsets import offset_that_returns

SIDE, DEVIATION = 32, 0.6
VP = variance_preserving(1000, 0.00085, 0.012, "v_prediction")
EULER = Drawing("euler", 28, "trailing", 3.0)
DENSITY = Density("logit_normal")


def bands(side: int = SIDE, deviation: float = DEVIATION, falling: float = 0.02) -> Bands:
    """One channel whose power falls with frequency, and whose mean has a deviation of its own."""
    number, frequency = radial_bands(side, side)
    power = 0.2 + falling / np.maximum(frequency, 0.5 / side)[None] ** 2
    power[:, 0] = side**2 * deviation**2
    return Bands(power, number, side, side)


def noises() -> dict[str, Noise]:
    return {
        "plain": PLAIN,
        "offset": Noise("offset", np.array([0.1])),
        "spectral": Noise("spectral", np.zeros(1), spectrum=lambda h, w: formula_spectrum("1 + f", h, w)[None]),
    }


@pytest.mark.parametrize("name", noises())
@pytest.mark.parametrize("process", [Flow(), VP])
def test_band_0_is_brightness(process: Any, name: str) -> None:
    noise = noises()[name]
    found = band_reach(process, noise, DENSITY, EULER, bands())
    expected = reach(process, noise, DENSITY, EULER, DEVIATION, SIDE, SIDE)
    assert found.returned[0] == pytest.approx(expected.matched, rel=1e-9)
    assert found.equal[0] == pytest.approx(expected.equal, rel=1e-9)
    assert found.trained[0] == pytest.approx(expected.trained, rel=1e-9)


@pytest.mark.parametrize("process", [Flow(), VP])
def test_an_offset_that_grows_with_time_follows_its_own_table(process: Any) -> None:
    noise = replace(noises()["offset"], kind="adjusted", growth=process.growth)
    found = band_reach(process, noise, DENSITY, EULER, bands())
    plain = band_reach(process, PLAIN, DENSITY, EULER, bands())
    assert found.returned[0] == pytest.approx(reach(process, noise, DENSITY, EULER, DEVIATION, SIDE, SIDE).matched)
    np.testing.assert_array_equal(found.returned[1:], plain.returned[1:])


def test_a_band_is_decided_where_its_noise_is_as_strong() -> None:
    found, data = band_reach(Flow(), PLAIN, DENSITY, EULER, bands()), bands().power[0]
    np.testing.assert_allclose(found.equal, 1 / (1 + 1 / np.sqrt(data)), atol=2e-5)


def test_channels_are_joined_by_their_power() -> None:
    one, other = bands(), bands(deviation=0.1)
    both = replace(one, power=np.concatenate([one.power, other.power]))
    found, first, second = (band_reach(Flow(), PLAIN, DENSITY, EULER, each) for each in (both, one, other))
    weighted = (first.returned[0] ** 2 * 0.36 + second.returned[0] ** 2 * 0.01) / 0.37
    assert found.returned[0] == pytest.approx(np.sqrt(weighted))
    assert found.equal[0] == first.equal[0]


@pytest.mark.parametrize("side", [64, 128])
def test_the_offset_that_is_recommended_is_the_least_that_returns_enough(side: int) -> None:
    data, uniform = bands(side), Density()
    found = remedy(Flow(), uniform, EULER, data).offset
    least = offset_that_returns(Flow(), uniform, EULER, DEVIATION, side, side)
    assert found is not None and least is not None and found == pytest.approx(least, rel=0.13)  # of steps of 12 %
    assert band_reach(Flow(), Noise("offset", np.array([found])), uniform, EULER, data).returned[0] >= ENOUGH - 0.002
    weaker = band_reach(Flow(), Noise("offset", np.array([0.8 * found])), uniform, EULER, data)
    assert weaker.returned[0] < ENOUGH


def test_a_density_that_hardly_trains_there_asks_for_more() -> None:
    data, drawing = bands(128), replace(EULER, num_steps=300)
    assert remedy(Flow(), Density(), drawing, data).offset == 0.0  # so many steps return it of plain noise
    found = remedy(Flow(), DENSITY, drawing, data).offset
    assert found and band_reach(Flow(), Noise("offset", np.array([found])), DENSITY, drawing, data).trained[0] >= SEEN
    assert band_reach(Flow(), PLAIN, DENSITY, drawing, data).trained[0] < SEEN / 100


def test_plain_noise_is_good_enough_where_it_is() -> None:
    found = remedy(Flow(), Density(), replace(EULER, num_steps=60), bands(8, falling=0.0))
    assert found.offset == 0.0 and found.spectrum is None


@pytest.mark.parametrize("process", [Flow(), VP])
def test_the_spectrum_returns_every_band_that_the_clean_end_does_not_lose(process: Any) -> None:
    drawing = Drawing("euler", 60, "trailing", 1.0)
    data = bands(64, falling=0.2)
    before = band_reach(process, PLAIN, Density(), drawing, data).returned
    formula = remedy(process, Density(), drawing, data).spectrum
    assert formula is not None and before[:2].max() < 0.9
    noise = Noise("spectral", np.zeros(1), spectrum=lambda h, w: formula_spectrum(formula, h, w)[None])
    coloured = band_means(noise.power(64, 64), data.number, 64)[0] > 1.01
    after = band_reach(process, noise, Density(), drawing, data).returned
    assert coloured[:2].all() and after[coloured].min() > 0.93
    np.testing.assert_allclose(after[~coloured], before[~coloured], atol=0.005)


def test_a_shift_that_returns_what_an_offset_would() -> None:
    drawing, data = Drawing("euler", 60, "trailing", 1.0), bands(32)
    shift = remedy(Flow(), Density(), drawing, data).shift
    assert shift is not None and 1.0 < shift < 10
    shifted, before = (
        band_reach(Flow(), PLAIN, Density(), replace(drawing, shift=each), data).returned for each in (shift, 1.0)
    )
    assert before[0] < 0.9 and shifted[0] > ENOUGH - 0.005
    assert (shifted > np.minimum(before - 0.01, ENOUGH) - 0.005).all()
    assert remedy(VP, Density(), drawing, data).shift is None  # which has none
