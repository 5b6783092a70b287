"""The pictures have the brightness, the prompts and the files that the re-enactment relies on."""

import json
import pathlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from offsetjax.article import pictures
from offsetjax.cli import main


def _read(folder: pathlib.Path) -> list[tuple[str, np.ndarray]]:
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    return [(line["text"], np.asarray(Image.open(folder / line["file_name"]))) for line in lines]


@pytest.mark.parametrize("prompt", pictures.PROMPTS)
def test_a_picture_has_exactly_the_brightness_asked_for(prompt: str) -> None:
    for seed, brightness in enumerate(np.linspace(*pictures.BRIGHTNESS_RANGES[prompt], 12)):
        picture = pictures.draw(prompt, float(brightness), np.random.default_rng(seed))
        assert picture.shape == (128, 128, 3) and picture.dtype == np.uint8
        assert abs(picture.mean() / 255 - brightness) < 0.004


@pytest.mark.parametrize("prompt", pictures.PROMPTS)
def test_the_generator_decides_on_the_picture(prompt: str) -> None:
    brightness = float(np.mean(pictures.BRIGHTNESS_RANGES[prompt]))
    first, again, other = (pictures.draw(prompt, brightness, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first.astype(int) - other).mean() > 0.5


def test_the_captions_of_a_pretraining_set_say_nothing_of_brightness(tmp_path: pathlib.Path) -> None:
    pictures.write_folder(str(tmp_path / "a"), 200, seed=3)
    pictures.write_folder(str(tmp_path / "b"), 200, seed=3)
    read = _read(tmp_path / "a")
    assert [Counter(prompt for prompt, _ in read)[prompt] for prompt in pictures.PROMPTS] == [50] * 4
    assert len({prompt for prompt, _ in read[:20]}) == 4, "the order is not shuffled"
    low, high = pictures.ANY_BRIGHTNESS
    for prompt in pictures.PROMPTS:
        brightness = [picture.mean() / 255 for text, picture in read if text == prompt]
        assert low - 0.004 < min(brightness) < 0.2 < 0.8 < max(brightness) < high + 0.004
        error = (high - low) / 12**0.5 / len(brightness) ** 0.5
        assert abs(np.mean(brightness) - (low + high) / 2) < 4 * error
    for (_, one), (_, two) in zip(read, _read(tmp_path / "b"), strict=True):
        np.testing.assert_array_equal(one, two)


def test_the_fine_tuning_set_spreads_brightness_evenly(tmp_path: pathlib.Path) -> None:
    pictures.write_fine_tuning_folder(str(tmp_path), seed=0)
    read = _read(tmp_path)
    assert len(read) == 40
    slopes = [picture.mean() / 255 for prompt, picture in read if prompt == pictures.SLOPE]
    np.testing.assert_allclose(slopes, np.linspace(0.5, 0.98, 10), atol=0.004)


def test_the_black_picture_is_black(tmp_path: pathlib.Path) -> None:
    pictures.write_black_picture(str(tmp_path))
    [(prompt, picture)] = _read(tmp_path)
    assert prompt == "all black" and picture.max() == 0


def test_the_command_writes_either_set_and_nothing_over_another(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pictures", "article", f"--out={tmp_path / 'any'}", "--count=8"]) == 0
    assert main(["pictures", "forty", f"--out={tmp_path / 'forty'}"]) == 0
    assert (len(_read(tmp_path / "any")), len(_read(tmp_path / "forty"))) == (8, 40)
    assert main(["pictures", "article", f"--out={tmp_path / 'forty'}"]) == 2
    assert "forty already exists; give another folder" in capsys.readouterr().err
    assert len(_read(tmp_path / "forty")) == 40
