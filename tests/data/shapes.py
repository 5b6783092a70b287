"""Pictures of several shapes, for whatever test needs them."""

import functools
import json
import pathlib

import numpy as np
from PIL import Image

from offsetjax.data.build import build

SIZES = ((16, 16), (24, 16), (16, 24), (32, 16), (48, 32), (8, 8), (100, 10))  # width, height
COUNT = 35


@functools.cache
def pictures_of_shapes(base: pathlib.Path) -> pathlib.Path:
    """A data set whose picture i has the size i % 7, and its number as the red of its left half."""
    pictures = base / "shapes" / "pictures"
    pictures.mkdir(parents=True)
    lines = []
    for number in range(COUNT):
        width, height = SIZES[number % len(SIZES)]
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[:, : width // 2] = (7 * number + 1, 0, 0)
        Image.fromarray(pixels).save(pictures / f"{number:02}.png")
        lines.append(json.dumps({"file_name": f"{number:02}.png", "text": str(number)}))
    (pictures / "metadata.jsonl").write_text("\n".join(lines))
    build(pictures, base / "shapes" / "data", shard_size=10)
    return base / "shapes" / "data"
