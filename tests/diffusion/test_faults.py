"""Faults that other trainers have, each of which is a test here: those of noise, loss weights and random streams."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np
import pytest

from offsetjax.config import validate
from offsetjax.data.buckets import square
from offsetjax.data.record import Picture
from offsetjax.data.source import Source
from offsetjax.data.stages import Order
from offsetjax.data.stream import Stream, _drawn, _flip_seed, _shown, _sized, make_stream
from offsetjax.diffusion.loss import min_snr_weight
from offsetjax.diffusion.variance_preserving import variance_preserving
from offsetjax.errors import UserError
from tests.tiny import quick_compilation
from tests.training.test_objective import LATENT, _config, _look

KINDS: dict[str, dict[str, Any]] = {
    "offset": {"offset_strength": 0.4},
    "channels": {"channel_strengths": (0.4, 0.0, 0.1, 0.2)},
    "random": {"offset_strength": 0.4, "random_strength": True},
    "probability": {"offset_strength": 0.4, "probability": 0.5},
    "adaptive": {"offset_strength": 0.4, "adaptive_scale": 0.5},
    "pyramid": {"kind": "pyramid", "pyramid_discount": 0.5, "pyramid_levels": 5},
    "pyramid with offset": {"kind": "pyramid", "pyramid_discount": 0.5, "pyramid_levels": 5, "offset_strength": 0.4},
    "spectral": {"kind": "spectral", "spectrum": ("2 + where(f == 0, 3, 0)",)},
    "adjusted": {"kind": "adjusted", "offset_strength": 0.4},
}
KEPT = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
SNR = KEPT / (1 - KEPT)
EXAMPLES, BATCH = 1 << 17, 1 << 15  # the correlation of independent draws has a standard deviation of 0.003


@pytest.fixture(scope="module", autouse=True)
def _quickly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with quick_compilation(tmp_path_factory.getbasetemp()):
        yield


def noisy_config(kind: str, **changes: Any) -> Any:
    return _config(**{f"noise__{key}": value for key, value in KINDS[kind].items()}, **changes)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", KINDS)
def test_offset_is_not_silently_off_nor_ignored_by_a_kind_or_a_parameterisation(
    kind: str, prediction_type: str
) -> None:
    changes = {"schedule__prediction_type": prediction_type}
    plain = _look(_config(**changes))
    seen = _look(noisy_config(kind, **changes))
    np.testing.assert_array_equal(plain.timesteps, seen.timesteps)
    difference = np.asarray(seen.target - plain.target)
    late = np.asarray(seen.timesteps) > 500
    means, all_of_it = difference[late].mean((2, 3)), difference[late]
    assert (means.std(0) > 0.02).any() and all_of_it.std() > 0.02
    # What the network sees differs by as much: it is the noise of its input too.
    kept = KEPT[np.asarray(seen.timesteps)][:, None, None, None]
    alpha = np.sqrt(kept) if prediction_type == "v_prediction" else 1.0  # v = α n - σ x0
    in_the_input = np.asarray(seen.noisy - plain.noisy) / np.sqrt(1 - kept)
    np.testing.assert_allclose((alpha * in_the_input)[late], difference[late], atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", KINDS)
def test_snr_based_weights_do_not_ignore_the_offset(kind: str, prediction_type: str) -> None:
    plain, weighted = (
        _look(noisy_config(kind, loss__min_snr_gamma=gamma, schedule__prediction_type=prediction_type))
        for gamma in (0.0, 5.0)
    )
    timesteps = np.asarray(plain.timesteps)
    ratio = SNR[timesteps]
    shift = {"channels": (0.16 + 0.01 + 0.04) / 4, "random": 0.16 / 3, "probability": 0.08, "pyramid": 0.0}
    variance = 1 + np.full(len(ratio), shift.get(kind, 0.16))  # of a pixel's noise
    if kind == "spectral":
        variance = np.full(len(ratio), 2 + 3 / 16)
    if kind == "adjusted":
        variance = 1 + 0.16 * SNR[-1] / ratio
    expected = np.minimum(ratio / variance, 5.0) / (ratio + (prediction_type == "v_prediction"))
    np.testing.assert_allclose(weighted.losses / plain.losses, expected, rtol=2e-4)
    ignoring = np.minimum(ratio, 5.0) / (ratio + (prediction_type == "v_prediction"))
    assert kind in ("pyramid", "adjusted") or np.abs(expected / ignoring - 1).max() > 0.04


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("variance", [1.0, 1.25, 4.0])
def test_min_snr_for_v_is_not_divided_as_for_epsilon(prediction_type: str, variance: float) -> None:
    """With any noise: the weight of an error of x0 is min(SNR, γ), with the SNR that a pixel has."""
    schedule = variance_preserving(1000, 0.00085, 0.012, prediction_type)
    for timestep in (0, 250, 500, 999):
        weight = float(min_snr_weight(schedule, timestep, 5.0, variance))
        moved = 1.0  # of the prediction; then of x̂0 = (x - σ n)/α or α x - σ v
        alpha, sigma = np.sqrt(KEPT[timestep]), np.sqrt(1 - KEPT[timestep])
        moved_latent = moved * (sigma / alpha if prediction_type == "epsilon" else sigma)
        pixel_snr = alpha**2 / (sigma**2 * variance)
        assert weight * moved**2 == pytest.approx(min(pixel_snr, 5.0) * moved_latent**2, rel=2e-4)


def test_min_snr_does_not_keep_a_zero_terminal_snr_model_from_black() -> None:
    changes = {"schedule__zero_terminal_snr": True, "schedule__prediction_type": "v_prediction"}
    validate(_config(**changes))
    with pytest.raises(UserError, match="min_snr_gamma"):
        validate(_config(loss__min_snr_gamma=5.0, **changes))
    losses = _look(_config(**changes, loss__min_timestep=999), 64, log_variance=0.0).losses
    assert np.mean(losses) == pytest.approx(1.0, abs=0.15)  # v = -x0 there: it counts in full


@pytest.mark.parametrize("kind", KINDS)
def test_the_batch_axis_is_not_squeezed_away_at_batch_1(kind: str) -> None:
    one, several = (_look(noisy_config(kind), count) for count in (1, 3))
    assert one.losses.shape == (1,) and one.noisy.shape == one.target.shape == (1, *LATENT)
    np.testing.assert_allclose(one.target[0], several.target[0], atol=1e-6)
    assert np.ptp(np.asarray(one.target)) > 0.5


def latent_of(seen: Any) -> np.ndarray:
    """The VAE's sample, of the large deviation that was asked for."""
    kept = KEPT[np.asarray(seen.timesteps)]
    return (np.ravel(seen.noisy) - np.sqrt(1 - kept) * np.ravel(seen.target)) / np.sqrt(kept) / np.exp(5.0)


def test_the_vae_sample_the_noise_and_the_flips_do_not_share_a_stream() -> None:
    """And neither do time steps nor caption dropout: every pair of an example's draws is uncorrelated."""

    @dataclass(frozen=True)
    class Pictures:
        """One picture, bright on its left."""

        label: str = "pictures"

        def __len__(self) -> int:
            return 1000

        def __getitem__(self, index: int) -> Picture:
            pixels = np.zeros((8, 8, 3), np.uint8)
            pixels[:, :4] = 255
            return Picture(pixels, "")

        def fingerprint(self) -> dict[str, Any]:
            return {}

        def shares_records(self, other: Source) -> bool:
            return False

    def stream(batch: int) -> Stream:
        return make_stream(
            Pictures(),
            seed=0,
            global_batch_size=batch,
            resolution=8,
            random_flip=True,
            tokenize=lambda _: ({}, 1, 1),
        )

    # The stream's threads are too slow for so many; its flips are read in their order, as a short stretch shows.
    indices = grain.MapDataset.source(range(1000)).seed(0).shuffle().repeat(None)
    drawn = partial(_drawn, partial(_shown, Pictures(), False), True, False)
    flipped = Order(indices.map(partial(_sized, square(8)))).random_map(drawn, seed=_flip_seed(0))
    flips = np.array([flipped[place]["pixels"][0, 0, 0] == 0 for place in range(EXAMPLES)])
    with contextlib.closing(stream(256).iterator()) as batches:
        for number in range(2):
            np.testing.assert_array_equal(next(batches)["pixels"][:, 0, 0, 0] == 0, flips[256 * number :][:256])

    config = _config(encode__caption_dropout=0.5, seed=0)
    draws = []
    for step in range(EXAMPLES // BATCH):
        seen = _look(config, BATCH, (1, 1, 1), step, log_variance=10.0)
        dropped = np.asarray(seen.input_ids)[:, 0] == 0
        place = slice(step * BATCH, (step + 1) * BATCH)
        draws.append([flips[place], np.ravel(seen.target), seen.timesteps, latent_of(seen), dropped])
    together = np.concatenate([np.array(each, np.float64) for each in draws], 1)
    assert together.shape == (5, EXAMPLES)
    np.testing.assert_allclose(together.mean(1)[[0, 1, 3, 4]], [0.5, 0, 0, 0.5], atol=0.015)
    np.testing.assert_allclose(together.std(1)[[1, 3]], 1, atol=0.015)
    assert np.abs(np.corrcoef(together) - np.eye(5)).max() < 0.01  # the worst of ten pairs
    magnitudes = np.abs(together - together.mean(1, keepdims=True))[1:4]
    assert np.abs(np.corrcoef(magnitudes) - np.eye(3)).max() < 0.01


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_input_perturbation_is_in_the_input_and_never_in_the_target(prediction_type: str) -> None:
    gamma, changes = 0.3, {"schedule__prediction_type": prediction_type, "noise__offset_strength": 0.2}
    plain = _look(_config(**changes), 4096)
    seen = _look(_config(noise__input_perturbation=gamma, **changes), 4096)
    np.testing.assert_array_equal(seen.target, plain.target)
    np.testing.assert_array_equal(seen.timesteps, plain.timesteps)
    sigma = np.sqrt(1 - KEPT[np.asarray(seen.timesteps)])[:, None, None, None]
    added = np.asarray(seen.noisy - plain.noisy) / sigma / gamma
    assert added.std() == pytest.approx(1.0, abs=0.01)
    assert abs(np.corrcoef(added.ravel(), np.ravel(seen.target))[0, 1]) < 0.01  # 262,144 values
    assert abs(np.corrcoef(added.mean((1, 2, 3)), np.asarray(seen.timesteps))[0, 1]) < 0.06


def test_input_perturbation_is_fresh_at_every_step() -> None:
    first, second = (
        np.ravel(_look(_config(noise__input_perturbation=1.0), 2048, step=step).noisy)
        - np.ravel(_look(_config(), 2048, step=step).noisy)
        for step in (0, 1)
    )
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.025
    assert jnp.std(first) > 0.1
