"""Brightness is the mean of a picture's values, and how two distributions of it differ."""

import pathlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from offsetjax.data.brightness import compare, data_brightness
from offsetjax.data.record import Picture
from offsetjax.data.source import open_source
from offsetjax.errors import UserError
from tests.tiny import RESOLUTION, data_path


def test_the_datas_brightness_is_that_of_its_pictures(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = data_path(tmp_path_factory.getbasetemp())
    files = sorted((pathlib.Path(path).parent / "pictures").glob("*.png"))
    expected = sorted(np.asarray(Image.open(file), np.float64).mean() / 255 for file in files)
    measured = data_brightness(open_source(path), RESOLUTION)
    assert sorted(measured) == pytest.approx(expected, abs=1e-9)
    assert len(data_brightness(open_source(path), RESOLUTION, at_most=5)) == 5


class Pictures:
    """A source of grey pictures; those of no bytes cannot be shown."""

    label = "made here"

    def __init__(self, *greys: int | None) -> None:
        self._greys = greys

    def __len__(self) -> int:
        return len(self._greys)

    def __getitem__(self, index: int) -> Picture:
        grey = self._greys[index]
        return Picture(b"" if grey is None else np.full((4, 4, 3), grey, np.uint8), "a picture")

    def fingerprint(self) -> dict[str, Any]:
        return {}

    def shares_records(self, other: Any) -> bool:
        return False


def test_a_picture_that_cannot_be_shown_is_named_or_left_out() -> None:
    source = Pictures(51, None, 204)
    with pytest.raises(UserError, match=r"record 1 \(without a name\) of made here is no picture: the file is empty"):
        data_brightness(source, 4)
    assert data_brightness(source, 4, may_be_bad=True).tolist() == pytest.approx([0.2, 0.8])
    with pytest.raises(UserError, match="is no picture"):
        data_brightness(Pictures(None, None), 4, may_be_bad=True)


def test_a_grey_model_against_data_of_every_brightness() -> None:
    data = np.linspace(0.0, 1.0, 1001)
    grey = compare([0.5] * 10, data)
    assert grey["std"] == 0 and grey["near_black"] == grey["near_white"] == 0
    assert grey["wasserstein"] == pytest.approx(0.25, abs=1e-3)  # ∫ |x - 1/2| dx
    same = compare(data, data)
    assert same["wasserstein"] == 0
    assert (same["near_black"], same["near_white"]) == pytest.approx((0.1, 0.1), abs=2e-3)


def test_the_distance_of_a_shift_is_the_shift() -> None:
    data = np.random.default_rng(0).uniform(0.2, 0.6, 500)
    assert compare(data + 0.07, data)["wasserstein"] == pytest.approx(0.07, abs=1e-9)
    assert compare(data + 0.07, data)["mean"] == pytest.approx(data.mean() + 0.07)
