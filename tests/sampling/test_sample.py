"""Pictures: what is written is what was drawn, and a picture depends on its own seed, prompt and start alone."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from offsetjax.errors import UserError
from offsetjax.models.pipeline import noising_of
from offsetjax.models.trained import Trained, load_trained
from offsetjax.sampling.pictures import Picture, grid
from offsetjax.sampling.reach import drawing
from offsetjax.sampling.sample import (
    draw_pictures,
    make_sampler,
    sample,
    sample_workdir,
    set_brightness,
    start_noise,
)
from offsetjax.sampling.size import drawn_size
from tests.tiny import CAPTIONS, RESOLUTION, quick_compilation, trained_workdir

SETTINGS = {"num_steps": 2, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    base = tmp_path_factory.getbasetemp()
    with quick_compilation(base):
        yield trained_workdir(base)


@pytest.fixture(scope="module")
def trained(workdir: pathlib.Path) -> Trained:
    return load_trained(workdir)


@pytest.fixture(scope="module")
def drawn(workdir: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, list[Picture]]:
    """Two prompts, two seeds, from the newest checkpoint."""
    out = tmp_path_factory.mktemp("drawn") / "pictures here"
    return out, sample_workdir(workdir, out, CAPTIONS[:2], (3, 8), **SETTINGS)


def _draw(
    trained: Trained, prompts: tuple[str, ...], seeds: tuple[int, ...], *, strength: float = 0.1, start: str = "matched"
) -> list[Picture]:
    config = trained.config.copy_and_resolve_references()
    config.noise.offset_strength, config.sample.start_noise = strength, start
    pipeline = dataclasses.replace(trained.pipeline, noising=noising_of(config, trained.pipeline.autoencoder.downscale))
    sampler = make_sampler(pipeline, config.sample, RESOLUTION, config.seed, trained.mesh)
    return draw_pictures(sampler, trained.params, trained.frozen, prompts, seeds, trained.step)


def test_the_files_are_the_pictures(drawn: tuple[pathlib.Path, list[Picture]]) -> None:
    out, pictures = drawn
    assert [(picture.prompt, picture.seed) for picture in pictures] == [(p, s) for p in CAPTIONS[:2] for s in (3, 8)]
    about = json.loads((out / "samples.json").read_text())
    files = [f"samples_{index:03}_seed_{picture.seed}.png" for index, picture in enumerate(pictures)]
    assert {file.name for file in out.iterdir()} == {"samples.png", "samples.json", *files}
    for name, picture, record in zip(files, pictures, about["records"], strict=True):
        with Image.open(out / name) as image:
            pixels = np.asarray(image)
        assert pixels.shape == (RESOLUTION, RESOLUTION, 3)
        assert np.array_equal(pixels, picture.image)
        # Brightness is the mean of all values, of black 0 and white 1, to the 5 places that are written.
        assert record["brightness"] == pytest.approx(pixels.astype(np.float64).mean() / 255, abs=6e-6)
        assert (record["prompt"], record["seed"]) == (picture.prompt, picture.seed)


def test_the_record_says_how_they_were_drawn(drawn: tuple[pathlib.Path, list[Picture]]) -> None:
    about = json.loads((drawn[0] / "samples.json").read_text())
    expected = {"step": 6, "params": "ema", "start_noise": "matched", "num_steps": 2, "spacing": "trailing"}
    assert {key: about[key] for key in expected} == expected


def test_a_picture_is_the_same_alone_and_among_others(
    drawn: tuple[pathlib.Path, list[Picture]], trained: Trained
) -> None:
    among = {(picture.prompt, picture.seed): picture.image.astype(int) for picture in drawn[1]}
    for prompt, seed in ((CAPTIONS[0], 3), (CAPTIONS[1], 8)):
        [alone] = _draw(trained, (prompt,), (seed,))
        assert np.abs(alone.image - among[prompt, seed]).max() <= 1


def test_more_pictures_than_are_drawn_at_once(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, drawn: tuple[pathlib.Path, list[Picture]]
) -> None:
    monkeypatch.setattr("offsetjax.sampling.sample._BATCH", 4)
    pictures = _draw(trained, CAPTIONS[:2], (3, 8, 9))
    assert [(picture.prompt, picture.seed) for picture in pictures] == [(p, s) for p in CAPTIONS[:2] for s in (3, 8, 9)]
    by_request = {(picture.prompt, picture.seed): picture.image.astype(int) for picture in pictures}
    for picture in drawn[1]:
        assert np.abs(by_request[picture.prompt, picture.seed] - picture.image).max() <= 1


def test_pictures_of_any_size_are_drawn(trained: Trained, tmp_path: pathlib.Path) -> None:
    [picture] = sample(trained, tmp_path / "wide", (CAPTIONS[0],), (3,), size="24x12")
    assert picture.image.shape == (12, 24, 3)
    assert json.loads((tmp_path / "wide" / "samples.json").read_text())["size"] == "24x12"
    for size, message in (
        ("24x13", r"sample\.size: 24x13 must be multiples of 2, such as 24x12"),
        ("24", "such as 1152"),
    ):
        with pytest.raises(UserError, match=message):
            sample(trained, tmp_path / "wide", (CAPTIONS[0],), (3,), size=size)


def test_each_size_has_its_own_shift_and_conditions(trained: Trained) -> None:
    config = trained.config.copy_and_resolve_references()
    config.schedule.update(process="flow", shift=2.0, shift_rule="resolution", shift_resolution=16)
    pipeline = dataclasses.replace(trained.pipeline, noising=noising_of(config, downscale=2))
    config.sample.size = "32x8"
    size = drawn_size(config.sample, RESOLUTION)
    assert size == (32, 8) and pipeline.latent_shape(*size) == (4, 4, 16)
    assert drawing(pipeline, config.sample, RESOLUTION).shift == pytest.approx(2.0)
    config.sample.size = "64x16"
    assert drawing(pipeline, config.sample, RESOLUTION).shift == pytest.approx(4.0)


def test_seeds_differ(drawn: tuple[pathlib.Path, list[Picture]]) -> None:
    first, second = (picture.image for picture in drawn[1][:2])
    assert not np.array_equal(first, second)


def test_the_start_is_matched_to_the_noise_of_training(trained: Trained) -> None:
    request = ((CAPTIONS[0],), (0, 1))
    matched = _draw(trained, *request, strength=0.5)
    plain = _draw(trained, *request, strength=0.5, start="plain")
    assert all(not np.array_equal(one.image, other.image) for one, other in zip(matched, plain, strict=True))
    without = [_draw(trained, *request, strength=0.0, start=start) for start in ("matched", "plain")]
    for one, other, third in zip(*without, plain, strict=True):
        assert np.array_equal(one.image, other.image)
        assert np.array_equal(one.image, third.image)  # a plain start knows of no strength


def test_brightness_moves_the_starts_mean_and_nothing_else(trained: Trained) -> None:
    noise, autoencoder = trained.pipeline.noising.noise(), trained.pipeline.autoencoder
    shape, keys = trained.pipeline.latent_shape(RESOLUTION), jax.random.split(jax.random.key(0), 512)
    start = start_noise(noise, shape, keys)
    vae = trained.frozen["vae"]

    def moved(value: float) -> np.ndarray:
        return np.asarray(set_brightness(autoencoder, vae, noise, start, jnp.full(len(keys), value)))

    dark, bright = moved(-2.0), moved(2.0)
    step = (bright - dark).mean((2, 3))
    np.testing.assert_allclose(bright - dark, np.broadcast_to(step[..., None, None], start.shape), atol=1e-5)
    np.testing.assert_allclose(step, np.broadcast_to(step[0], step.shape), atol=1e-5)
    # Four standard deviations of the start's mean, towards the latents of a white picture.
    deviation = np.sqrt(0.1**2 + 1 / (shape[1] * shape[2]))
    assert np.linalg.norm(step[0]) == pytest.approx(4 * deviation, rel=1e-4)
    white, black = (
        np.asarray(trained.pipeline.autoencoder.encode(vae, jnp.full((1, 3, RESOLUTION, RESOLUTION), x))[0]).mean(
            (0, 2, 3)
        )
        for x in (1.0, -1.0)
    )
    cosine = step[0] @ (white - black) / np.linalg.norm(step[0]) / np.linalg.norm(white - black)
    assert cosine == pytest.approx(1.0, abs=1e-4)
    # Drawn from the distribution itself, the values leave the start's distribution as it is.
    values = jax.random.normal(jax.random.key(1), (len(keys),))
    redrawn = np.asarray(set_brightness(autoencoder, vae, noise, start, values))
    assert redrawn.mean((2, 3)).std(0) == pytest.approx(np.full(4, deviation), rel=0.15)


def test_a_picture_for_each_value_of_brightness(workdir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    values = (-3.0, 0.0, 3.0)
    pictures = sample_workdir(workdir, tmp_path / "out", CAPTIONS[:1], (3,), brightness=values, **SETTINGS)
    assert [picture.start for picture in pictures] == list(values)
    records = json.loads((tmp_path / "out" / "samples.json").read_text())["records"]
    assert [record["start"] for record in records] == list(values)
    assert len({picture.image.tobytes() for picture in pictures}) == 3


@pytest.mark.parametrize("sampler", ["ddpm", "euler", "euler_ancestral", "dpmpp_2m"])
def test_each_sampler_draws(workdir: pathlib.Path, tmp_path: pathlib.Path, sampler: str) -> None:
    settings = {**SETTINGS, "sampler": sampler, "num_steps": 3}
    first = sample_workdir(workdir, tmp_path / "first", CAPTIONS[:1], (3, 4), **settings)
    [again] = sample_workdir(workdir, tmp_path / "again", CAPTIONS[:1], (3,), **settings)
    assert json.loads((tmp_path / "first" / "samples.json").read_text())["sampler"] == sampler
    assert np.abs(first[0].image.astype(int) - again.image).max() <= 1  # injected noise, too, is a picture's own
    assert not np.array_equal(first[0].image, first[1].image)


def test_the_checkpoint_and_its_weights_are_chosen(
    workdir: pathlib.Path, tmp_path: pathlib.Path, drawn: tuple[pathlib.Path, list[Picture]]
) -> None:
    for name, choice in {"raw": {"params": "raw"}, "early": {"step": 2}}.items():
        sample_workdir(workdir, tmp_path / name, CAPTIONS[:2], (3, 8), **choice, **SETTINGS)
        about = json.loads((tmp_path / name / "samples.json").read_text())
        assert (about["step"], about["params"]) == {"raw": (6, "raw"), "early": (2, "ema")}[name]


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"step": 5}, "has no step 5 (it has 2, 4, 6)"),
        ({"num_steps": 0}, "sample.num_steps = 0 must be at least 1"),
        ({"num_steps": 1001}, "sample.num_steps = 1001 must be at most 1000"),
        ({"guidance_scale": -1.0}, "sample.guidance_scale = -1.0 must be at least 0"),
        ({"sampler": "plms"}, "sample.sampler = 'plms' must be one of ddim, "),
        ({"sampler": "ddpm", "brightness": (1.0,)}, "sample.brightness sets the start, which"),
        ({"seeds": (-1,)}, "--seed=-1 must be between 0 and"),
        ({"seeds": (2**32,)}, "--seed=4294967296 must be between 0 and"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    workdir: pathlib.Path, tmp_path: pathlib.Path, choice: dict[str, object], words: str
) -> None:
    with pytest.raises(UserError) as caught:
        sample_workdir(workdir, tmp_path / "out", ["a cat"], **{"seeds": (0,), **choice})
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_grid_has_a_row_for_each_prompt_with_its_pictures_in_order() -> None:
    rng = np.random.default_rng(0)
    pictures = [
        Picture(prompt, seed, rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for prompt in "ab" for seed in range(3)
    ]
    canvas = np.asarray(grid(pictures))
    places = []
    for picture in pictures:
        found = [
            (y, x)
            for y in range(canvas.shape[0] - 7)
            for x in range(canvas.shape[1] - 7)
            if np.array_equal(canvas[y : y + 8, x : x + 8], picture.image)
        ]
        assert len(found) == 1
        places += found
    rows, columns = zip(*places, strict=True)
    assert rows[0] == rows[1] == rows[2] < rows[3] == rows[4] == rows[5]
    assert columns[0] < columns[1] < columns[2]
    assert columns[:3] == columns[3:]


def test_a_long_prompt_is_written_whole_above_its_pictures() -> None:
    prompt = "a lighthouse at the end of a pier, an old engraving, " * 5

    def text(side: int) -> np.ndarray:
        return np.asarray(grid([Picture(prompt, 0, np.full((side, side, 3), 255, np.uint8))])).min(2)

    narrow, wide = text(200), text(2000)
    assert narrow.shape[1] == 200 and (narrow[:, -1] == 255).all()
    ink = [(255 - each.astype(int)).sum() for each in (narrow, wide)]
    assert ink[0] == pytest.approx(ink[1], rel=0.02)  # letters lie between pixels elsewhere
