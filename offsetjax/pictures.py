"""Pictures as they are kept: a grid, a PNG each, and a record of how they were drawn and how bright they are."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont


@dataclass(frozen=True)
class Picture:
    """One sample: `image` uint8 [H, W, 3].

    `brightness` is the mean of all values, 0 black and 1 white; `start` is what `sample.brightness` asked for, or None.
    """

    prompt: str
    seed: int
    image: np.ndarray
    start: float | None = None

    @property
    def brightness(self) -> float:
        return float(self.image.mean() / 255.0)


def write_samples(directory: epath.PathLike, name: str, pictures: Sequence[Picture], about: Mapping[str, Any]) -> None:
    """Writes `name.png`, a row a prompt and a column a seed, and `name.json` with each picture's brightness."""
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_png(directory / f"{name}.png", grid(pictures))
    about = {**about, "records": [_record(picture) for picture in pictures]}
    (directory / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n")


def _record(picture: Picture) -> dict[str, Any]:
    start = {} if picture.start is None else {"start": picture.start}
    return {"prompt": picture.prompt, "seed": picture.seed, **start, "brightness": round(picture.brightness, 5)}


def grid(pictures: Sequence[Picture]) -> Image.Image:
    """The pictures, a row a prompt, each row under its prompt."""
    rows: dict[str, list[Picture]] = {}
    for picture in pictures:
        rows.setdefault(picture.prompt, []).append(picture)
    height, width = pictures[0].image.shape[:2]
    gap, text = 4, 16
    columns = max(len(row) for row in rows.values())
    canvas = Image.new("RGB", (columns * (width + gap) - gap, len(rows) * (height + gap + text) - gap), "white")
    ink = ImageDraw.Draw(canvas)
    for y, (prompt, row) in enumerate(rows.items()):
        top = y * (height + gap + text)
        ink.text((1, top + 1), prompt or "(no prompt)", fill="black")
        for x, picture in enumerate(row):
            canvas.paste(Image.fromarray(picture.image), (x * (width + gap), top + text))
    return canvas


def write_comparison(
    directory: epath.Path, before: Sequence[Picture], after: Sequence[Picture], about: Mapping[str, Any]
) -> None:
    """Writes `compare.png`, pairs of pictures with the brightness under each, and `compare.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    write_png(directory / "compare.png", side_by_side(before, after))
    pairs = [
        {**_record(first), "before": round(first.brightness, 5), "after": round(second.brightness, 5)}
        for first, second in zip(before, after, strict=True)
    ]
    for pair in pairs:
        pair.pop("brightness")
    (directory / "compare.json").write_text(json.dumps({**about, "records": pairs}, indent=1) + "\n")


def side_by_side(before: Sequence[Picture], after: Sequence[Picture]) -> Image.Image:
    """Before and after for each prompt and seed: a row a prompt under its text, a pair a seed."""
    rows: dict[str, list[tuple[Picture, Picture]]] = {}
    for first, second in zip(before, after, strict=True):
        rows.setdefault(first.prompt, []).append((first, second))
    height, width = before[0].image.shape[:2]
    size = max(11, width // 24)
    font = ImageFont.load_default(size)
    gap, line = max(4, width // 64), round(1.5 * size)
    pair_width, row_height = 2 * width + gap, height + 2 * line + gap
    columns = max(len(row) for row in rows.values())
    canvas = Image.new("RGB", (columns * (pair_width + 3 * gap) - gap, len(rows) * row_height + gap), "#808080")
    ink = ImageDraw.Draw(canvas)
    for y, (prompt, row) in enumerate(rows.items()):
        top = gap + y * row_height
        ink.text((gap, top), prompt or "(no prompt)", fill="white", font=font)
        for x, pair in enumerate(row):
            for place, (name, picture) in enumerate(zip(("before", "after"), pair, strict=True)):
                left = gap + x * (pair_width + 3 * gap) + place * (width + gap)
                canvas.paste(Image.fromarray(picture.image), (left, top + line))
                text = f"{name} {picture.brightness:.2f}"
                ink.text((left, top + line + height + 1), text, fill="white", font=font)
    return canvas


def write_png(path: epath.Path, image: Image.Image) -> None:
    """Writes a PNG, to remote paths too."""
    with path.open("wb") as file:
        image.save(file, "PNG")
