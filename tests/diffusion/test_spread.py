"""The spread that a sampler returns, against flow.md's algebra written down a second time and against trained facts."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from offsetjax.diffusion.density import Density
from offsetjax.diffusion.flow import Flow
from offsetjax.diffusion.noise import PLAIN, Noise
from offsetjax.diffusion.spread import Drawing, Reach, channel_means, equal_at, reach
from offsetjax.diffusion.variance_preserving import variance_preserving
from tests.diffusion.offsets import offset_that_returns

DEVIATION = 0.6


def offset(strength: float, **settings: object) -> Noise:
    return Noise("offset", np.array([strength]), **settings) if strength else PLAIN


def of_flow(strength: float, steps: int, shift: float, side: int = 128, sampler: str = "euler") -> Reach:
    drawing = Drawing(sampler, steps, "trailing", shift)
    return reach(Flow(), offset(strength), Density("logit_normal"), drawing, DEVIATION, side, side)


@pytest.mark.parametrize(
    ("steps", "shift", "shares"),
    [
        (20, 1.0, (0.24, 0.77, 0.86, 0.91, 0.07)),
        (28, 1.0, (0.33, 0.83, 0.90, 0.94, 0.07)),
        (28, 3.0, (0.67, 0.93, 0.95, 0.96, 0.07)),
        (50, 1.0, (0.52, 0.90, 0.94, 0.96, 0.07)),
        (50, 3.0, (0.81, 0.96, 0.97, 0.97, 0.08)),
        (100, 3.0, (0.90, 0.98, 0.99, 0.99, 0.08)),
    ],
)
def test_of_a_flow_by_steps_shift_and_strength(steps: int, shift: float, shares: tuple[float, ...]) -> None:
    """Of 1024 px, a mean of standard deviation .6: what Euler's product of velocities gives, to two digits."""
    found = [of_flow(strength, steps, shift).matched for strength in (0.0, 0.05, 0.1, 0.2)]
    np.testing.assert_allclose([*found, of_flow(0.1, steps, shift).plain], shares, atol=0.0051)


def test_eulers_product_of_velocities() -> None:
    line = np.linspace(1.0, 0.0, 29)
    t = 3 * line / (1 + 2 * line)
    data, power = 16_384 * 0.36, 1 + 0.05**2 * 16_384
    x = np.sqrt(power)
    for here, after in itertools.pairwise(t):
        velocity = (here * power - (1 - here) * data) / ((1 - here) ** 2 * data + here**2 * power)
        x *= 1 + (after - here) * velocity
    assert of_flow(0.05, 28, 3.0).matched == pytest.approx(x / np.sqrt(data), rel=1e-9)


def test_the_share_of_training_above_equality() -> None:
    for strength, side, equal, trained in (
        (0.0, 64, 0.975, 0.00013), (0.1, 64, 0.856, 0.038), (0.0, 128, 0.987, 0.0000068), (0.05, 128, 0.922, 0.0069),
    ):  # fmt: skip
        found = of_flow(strength, 28, 1.0, side)
        exact = 1 / (1 + np.sqrt((1 + strength**2 * side**2) / (DEVIATION**2 * side**2)))
        assert found.equal == pytest.approx(exact, abs=1e-5) and exact == pytest.approx(equal, abs=6e-4)
        assert found.trained == pytest.approx(trained, rel=0.06)


@pytest.mark.parametrize(("side", "share"), [(128, 0.08), (64, 0.15)])
def test_a_plain_start_collapses_to_what_the_noises_are_to_one_another(side: int, share: float) -> None:
    found = of_flow(0.1, 1000, 3.0, side)
    assert found.matched == pytest.approx(1.0, abs=0.005)
    assert found.plain / found.matched == pytest.approx(1 / np.sqrt(1 + 0.01 * side**2), rel=1e-6)
    assert found.plain == pytest.approx(share, abs=0.006)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "unipc", "ddim", "ddpm", "euler_ancestral"])
def test_every_sampler_returns_it_whole_in_many_steps(sampler: str) -> None:
    assert of_flow(0.1, 900, 1.0, 16, sampler).matched == pytest.approx(1.0, abs=0.02)


def vp(strength: float, zero: bool = False, sampler: str = "ddim", deviation: float = DEVIATION) -> Reach:
    process = variance_preserving(1000, 0.00085, 0.012, "v_prediction", zero_terminal_snr=zero)
    drawing = Drawing(sampler, 50, "trailing")
    return reach(process, offset(strength), Density(), drawing, deviation, 64, 64)


def test_the_present_process_in_its_own_terms() -> None:
    """What a start without `√ᾱ_T x0` loses, `√(σ_T² P / V)`, in the limit of small steps; and t* in timesteps."""
    process = variance_preserving(1000, 0.00085, 0.012, "epsilon")
    kept = float(process.alphas_cumprod[-1])
    drawing = Drawing("euler", 1000, "trailing")
    for strength in (0.0, 0.1):
        power, data = 1 + strength**2 * 4096, 4096 * DEVIATION**2
        found = reach(process, offset(strength), Density(), drawing, DEVIATION, 64, 64)
        lost = np.sqrt((1 - kept) * power / (kept * data + (1 - kept) * power))
        # Each channel's own steps are small, so that little more than the start's loss is lost.
        assert found.matched == pytest.approx(lost * np.sqrt(1 - kept), abs=0.02), strength
    # Plain noise leaves 6.9 of SNR at the last timestep: the mean is legible throughout, and so decided nowhere.
    assert vp(0.0).equal == 1.0 and vp(0.0).trained == 0.0
    snr = kept / (1 - kept) * data / power
    assert snr < 1 and 0.8 < found.equal < 0.95 and found.trained == pytest.approx(1 - found.equal)
    at = int(found.equal * 1000)
    assert process.snr(at) * data / power > 1 > process.snr(at + 1) * data / power
    # From plain noise most of the offset's mean is missing.
    assert found.plain < found.matched / 3 and vp(0.1, zero=True).matched > 0.9


def test_noise_that_changes_with_time_is_followed() -> None:
    for process in (Flow(), variance_preserving(1000, 0.00085, 0.012, "v_prediction")):
        noise = replace(offset(0.3), kind="adjusted", growth=process.growth)
        drawing = Drawing("euler", 1000, "trailing")
        found = reach(process, noise, Density(), drawing, 0.3, 16, 16)
        assert found.matched == pytest.approx(1.0, abs=0.06)
        if process.includes_rate:  # the map is linear; of a variance-preserving one other samplers have another table
            assert found.plain / found.matched == pytest.approx(1 / np.sqrt(1 + 0.09 * 256), rel=1e-6)
        assert found.plain < 0.7
        modes = channel_means(noise, 0.3, 16, 16)
        later = equal_at(process, noise, modes)
        assert later > equal_at(process, replace(noise, growth=None), modes)


def test_the_channel_of_which_the_least_comes_back_is_the_one() -> None:
    drawing = Drawing("euler", 28, "trailing", 3.0)
    both = reach(Flow(), PLAIN, Density(), drawing, np.array([0.1, 0.6]), 128, 128)
    assert both == of_flow_uniform(0.6) != of_flow_uniform(0.1)


def of_flow_uniform(deviation: float) -> Reach:
    return reach(Flow(), PLAIN, Density(), Drawing("euler", 28, "trailing", 3.0), deviation, 128, 128)


def test_the_offset_that_returns_enough() -> None:
    drawing = Drawing("euler", 28, "trailing", 3.0)
    strength = offset_that_returns(Flow(), Density(), drawing, DEVIATION, 128, 128, 0.9)
    assert strength is not None and 0.02 < strength < 0.05
    assert of_flow(strength, 28, 3.0).matched >= 0.9 > of_flow(strength * 0.85, 28, 3.0).matched
    assert offset_that_returns(Flow(), Density(), replace(drawing, num_steps=1000), 0.1, 16, 16) == 0.0
    assert offset_that_returns(Flow(), Density(), replace(drawing, num_steps=2), DEVIATION, 128, 128) is None
