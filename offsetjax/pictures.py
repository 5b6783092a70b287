"""Pictures as they are kept: a grid, a PNG each, and a record of how they were drawn and how bright they are."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

_LEAST_WIDTH = 160  # of a picture in a comparison, and of a grid, in pixels


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
    gap, line, font = 4, 14, ImageFont.load_default(11)
    columns = max(len(row) for row in rows.values())
    canvas_width = max(_LEAST_WIDTH, columns * (width + gap) - gap)
    texts = {prompt: _wrapped(prompt or "(no prompt)", font, canvas_width - 2) for prompt in rows}
    row_heights = {prompt: len(lines) * line + 2 * gap + height for prompt, lines in texts.items()}
    canvas = Image.new("RGB", (canvas_width, sum(row_heights.values()) - gap), "white")
    ink, top = ImageDraw.Draw(canvas), 0
    for prompt, row in rows.items():
        for place, text in enumerate(texts[prompt]):
            ink.text((1, top + place * line), text, fill="black", font=font)
        below = top + len(texts[prompt]) * line + gap
        for x, picture in enumerate(row):
            canvas.paste(Image.fromarray(picture.image), (x * (width + gap), below))
        top += row_heights[prompt]
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
    """Before and after for each prompt and seed: a row a prompt under its text, a pair a seed.

    Small pictures are enlarged by a whole number, so that there is room for what is written under them.
    """
    rows: dict[str, list[tuple[Picture, Picture]]] = {}
    for first, second in zip(before, after, strict=True):
        rows.setdefault(first.prompt, []).append((first, second))
    scale = -(-_LEAST_WIDTH // before[0].image.shape[1])
    height, width = (scale * side for side in before[0].image.shape[:2])
    letters, gap = max(13, width // 28), max(6, width // 64)
    font, line = ImageFont.load_default(letters), round(1.5 * letters)
    pair_width, columns = 2 * width + gap, max(map(len, rows.values()))
    text_width = columns * (pair_width + 3 * gap) - 3 * gap
    texts = {prompt: _wrapped(prompt or "(no prompt)", font, text_width) for prompt in rows}
    row_heights = {prompt: (len(lines) + 1) * line + height + 2 * gap for prompt, lines in texts.items()}
    canvas = Image.new("RGB", (text_width + 2 * gap, gap + sum(row_heights.values())), "#5a5a5a")
    ink, top = ImageDraw.Draw(canvas), gap
    for prompt, row in rows.items():
        for place, text in enumerate(texts[prompt]):
            ink.text((gap, top + place * line), text, fill="white", font=font)
        below = top + len(texts[prompt]) * line
        for column, pair in enumerate(row):
            for place, (name, picture) in enumerate(zip(("before", "after"), pair, strict=True)):
                left = gap + column * (pair_width + 3 * gap) + place * (width + gap)
                image = Image.fromarray(picture.image).resize((width, height), Image.Resampling.NEAREST)
                canvas.paste(image, (left, below))
                text = f"{name}: brightness {picture.brightness:.2f}"
                ink.text((left, below + height + gap // 2), text, fill="white", font=font)
        top += row_heights[prompt]
    return canvas


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """The text in lines of at most that many pixels, but for words that are wider."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def write_png(path: epath.Path, image: Image.Image) -> None:
    """Writes a PNG, to remote paths too."""
    with path.open("wb") as file:
        image.save(file, "PNG")
