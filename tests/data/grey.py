"""A data set whose pictures tell their number and which way round they are."""

import pathlib

import numpy as np
from PIL import Image

from offsetjax.data.build import build


def grey_pictures(root: pathlib.Path, count: int, side: int) -> pathlib.Path:
    """Picture i has the grey value 10 i + 10 on its left half and is black on the right; its caption says i."""
    (root / "pictures").mkdir()
    for number in range(count):
        pixels = np.zeros((side, side, 3), np.uint8)
        pixels[:, : side // 2] = 10 * number + 10
        Image.fromarray(pixels).save(root / "pictures" / f"{number:02}.png")
        (root / "pictures" / f"{number:02}.txt").write_text(str(number))
    build(root / "pictures", root / "set")
    return root / "set"
