"""The recipe of an exported model, run as PyTorch users would: its latents have the distribution of our start."""

import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import torch

from offsetjax.exporting.export import export, write_spectrum
from offsetjax.exporting.model_card import model_card
from offsetjax.models.pipeline import build
from offsetjax.sampling.reach import matched_sampler
from tests import tiny

COUNT = 4096
NOISES: dict[str, dict[str, Any]] = {
    "plain": {"noise__offset_strength": 0.0},
    "offset": {"noise__offset_strength": 0.5},
    "channels": {"noise__offset_strength": 0.0, "noise__channel_strengths": (0.1, 0.2, 0.3, 0.4)},
    "reference": {"noise__offset_strength": 0.5, "noise__reference_resolution": 64},
    "random": {"noise__offset_strength": 0.5, "noise__random_strength": True, "noise__probability": 0.5},
    "adaptive": {
        "noise__offset_strength": 0.2,
        "noise__adaptive_scale": 0.5,
        "noise__data_mean": (0.5, -0.5, 0.0, 1.0),
        "noise__data_mean_std": (0.1, 0.2, 0.3, 0.4),
    },
    "pyramid": {"noise__kind": "pyramid", "noise__pyramid_discount": 0.8, "noise__pyramid_levels": 4},
    "spectral": {
        "noise__kind": "spectral",
        "noise__offset_strength": 0.0,
        "noise__spectrum": ("1 + 1 / (f + 0.1)", "1", "where(f == 0, 9, 1)", "2 * exp(-f)"),
    },
    "adjusted": {"noise__kind": "adjusted", "noise__offset_strength": 0.5},
}


def recipe(card: str) -> str:
    """The code of a card: its indented lines."""
    return "\n".join(line[4:] for line in card.splitlines() if line.startswith("    ") or not line.strip())


def latent_lines(card: str) -> str:
    """The part that draws `latents`."""
    code = recipe(card)
    return code[code.index("b = len") :].split("\n", 1)[1].split("images =")[0]


def powers(noise: np.ndarray) -> np.ndarray:
    """The power of each mode, a channel."""
    return (np.abs(np.fft.rfft2(noise, norm="ortho")) ** 2).mean(0)


@pytest.mark.parametrize("name", NOISES)
def test_the_recipes_latents_are_distributed_like_our_start(
    name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.tiny_config(**NOISES[name])
    pipeline = build(config)
    write_spectrum(tmp_path, pipeline, config.data.resolution, 1)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"torch": torch, "b": COUNT}
    exec(latent_lines(model_card(pipeline, config.sample, config.data.resolution, 1)), names)
    theirs = names["latents"].numpy()
    ours = np.asarray(tiny.start_of(pipeline, config, jax.random.split(jax.random.key(0), COUNT)))
    assert theirs.shape == ours.shape and theirs.dtype == ours.dtype
    # Both have, a mode, the power of theory; a mode's power has a standard error of at most √(2 kurtosis / count).
    expected = np.broadcast_to(pipeline.noising.noise().power(8, 8), powers(ours).shape)
    for drawn in (ours, theirs):
        assert np.abs(powers(drawn) / expected - 1).max() < 5 * np.sqrt(6 / COUNT), name
    # And the same shape of distribution where it is not normal.
    means = [np.abs(drawn.mean((2, 3))[:, 0]) for drawn in (ours, theirs)]
    quantiles = [np.quantile(mean, (0.25, 0.5, 0.75, 0.9)) for mean in means]
    np.testing.assert_allclose(*quantiles, rtol=0.15)


@pytest.mark.parametrize(
    ("noise", "sampler", "expected"),
    [
        ("plain", "euler_ancestral", "euler_ancestral"),
        ("offset", "euler_ancestral", "ddim"),  # PyTorch's would inject plain noise
        ("offset", "dpmpp_2m", "dpmpp_2m"),
        ("pyramid", "ddpm", "ddim"),
        ("adjusted", "ddim", "euler_ancestral"),  # PyTorch's knows nothing of a shift that changes with time
        ("adjusted", "ddpm", "ddpm"),
    ],
)
def test_the_exported_scheduler_needs_no_more_than_the_start(noise: str, sampler: str, expected: str) -> None:
    config = tiny.tiny_config(**NOISES[noise], sample__sampler=sampler)
    pipeline = build(config)
    assert matched_sampler(pipeline, config.sample.sampler, pipeline.noising.noise(1)) == expected


def test_the_whole_recipe_runs_in_the_exported_folder(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path_factory.getbasetemp()
    with tiny.quick_compilation(base):
        export(tiny.trained_workdir(base), tmp_path / "model")
    monkeypatch.chdir(tmp_path / "model")
    names: dict[str, Any] = {}
    exec(recipe((tmp_path / "model" / "README.md").read_text()), names)
    [image] = names["images"]
    assert image.size == (tiny.RESOLUTION, tiny.RESOLUTION)
    # The offset of .1 is there: without it a channel's mean deviates by 1/8.
    assert names["strength"].item() == pytest.approx(0.1)
