"""Tux Paint's stamps become captioned pictures on grounds of known brightness."""

import json
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from offsetjax.cli import main
from offsetjax.prepare.stamps import INSTALLED, write_stamps

GROUNDS = {"black": 0, "white": 255, "grey": 128}


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """A "disc", its left half red and its right half clear with green hidden in it, and a black "letter"."""
    below = tmp_path / "stamps" / "below"
    below.mkdir(parents=True)
    pixels = np.zeros((40, 80, 4), np.uint8)
    pixels[:, :40], pixels[:, 40:] = (255, 0, 0, 255), (0, 255, 0, 0)
    Image.fromarray(pixels).save(below / "disc.png")
    (below / "disc.txt").write_text("A disc.\nde.utf8=Eine Scheibe.\n", encoding="utf-8")
    Image.new("RGBA", (20, 20), (0, 0, 0, 255)).save(below / "letter.png")
    (below / "letter.txt").write_text("The letter I.\n")
    Image.new("RGBA", (20, 20), (9, 9, 9, 255)).save(below / "untold.png")
    return tmp_path / "stamps"


def read(out: pathlib.Path) -> dict[str, np.ndarray]:
    lines = [json.loads(line) for line in (out / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["text"]: np.asarray(Image.open(out / line["file_name"])) for line in lines}


def test_each_cut_out_lies_on_each_ground_on_which_it_shows(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert main(["pictures", "stamps", f"--out={tmp_path / 'out'}", f"--stamps={folder}", "--size=64"]) == 0
    pictures = read(tmp_path / "out")
    everywhere = {"black", "white", "grey", "dark blue"}
    expected = {f"A disc, on a {ground} background." for ground in everywhere}
    assert set(pictures) == expected | {f"The letter I, on a {ground} background." for ground in everywhere - {"black"}}
    for ground, level in GROUNDS.items():
        picture = pictures[f"A disc, on a {ground} background."]
        assert picture.shape == (64, 64, 3)
        np.testing.assert_array_equal(picture[32, 16], (255, 0, 0))
        np.testing.assert_array_equal(picture[32, 48], (level,) * 3)
        np.testing.assert_array_equal(picture[4, 4], (level,) * 3)
        green_leak = picture[..., 1].astype(int) - level
        assert green_leak.max() <= 1, "the colour hidden under the transparent half shows"


def test_mistakes_end_with_status_2_and_one_line(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    for arguments, message in (
        ([f"--out={tmp_path / 'out'}", f"--stamps={tmp_path / 'none'}"], "apt-get install tuxpaint-stamps-default"),
        ([f"--out={tmp_path / 'there'}", f"--stamps={folder}"], "already exists"),
        ([f"--out={tmp_path / 'out'}", f"--stamps={folder}", "--size=1"], "at least 8"),
    ):
        assert main(["pictures", "stamps", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(
    not pathlib.Path(INSTALLED).is_dir() and not os.environ.get("CI"),
    reason="Debian's tuxpaint-stamps-default is not installed",
)
def test_the_real_stamps_cover_the_range_of_brightness(tmp_path: pathlib.Path) -> None:
    write_stamps(str(tmp_path / "out"), size=16)
    pictures = read(tmp_path / "out")
    assert len(pictures) > 1500 and "A windmill, on a black background." in pictures
    brightness = np.array([picture.mean() / 255 for picture in pictures.values()])
    shares = np.histogram(brightness, 5, (0, 1))[0] / len(brightness)
    assert shares.min() > 0.05, "a fifth of the range is nearly empty"
