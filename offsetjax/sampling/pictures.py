"""Pictures as they are kept: a grid, a PNG each, and a record of how they were drawn and how bright they are."""

import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

from offsetjax.files import write_all
from offsetjax.json_text import signed

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


def write_samples(
    directory: epath.PathLike, name: str, pictures: Sequence[Picture], about: Mapping[str, Any], has_each: bool = False
) -> None:
    """Writes `name.png`, a row a prompt and a column a seed, and `name.json` with each one's brightness and place.

    Args:
        has_each: whether each picture is written by itself too, as `name_<number>_seed_<seed>.png`.
    """
    directory = epath.Path(directory)
    layout = _lay_out(pictures)
    records = [
        {**_record(picture), "box": [left, top, left + picture.image.shape[1], top + picture.image.shape[0]]}
        for picture, (left, top) in zip(pictures, layout.corners, strict=True)
    ]
    files: dict[epath.Path, bytes | str] = {directory / f"{name}.png": _png(_draw(pictures, layout))}
    for index, picture in enumerate(pictures) if has_each else ():
        files[directory / f"{name}_{index:03}_seed_{picture.seed}.png"] = _png(Image.fromarray(picture.image))
    write_all({**files, directory / f"{name}.json": json.dumps(signed({**about, "records": records}), indent=1) + "\n"})


def _record(picture: Picture) -> dict[str, Any]:
    start = {} if picture.start is None else {"start": picture.start}
    return {"prompt": picture.prompt, "seed": picture.seed, **start, "brightness": round(picture.brightness, 5)}


def grid(pictures: Sequence[Picture]) -> Image.Image:
    """The pictures, a row a prompt, each row under its prompt."""
    return _draw(pictures, _lay_out(pictures))


@dataclass(frozen=True)
class _Layout:
    """Where a grid has what, in pixels: its size, each picture's top left corner, lines of text with theirs."""

    size: tuple[int, int]
    corners: tuple[tuple[int, int], ...]
    lines: tuple[tuple[int, str], ...]
    font: Any


def _lay_out(pictures: Sequence[Picture]) -> _Layout:
    rows = Counter(picture.prompt for picture in pictures)
    height, width = pictures[0].image.shape[:2]
    gap, line, font = 4, 14, ImageFont.load_default(11)
    canvas_width, top = max(_LEAST_WIDTH, max(rows.values()) * (width + gap) - gap), 0
    lines, tops = [], {}
    for prompt in rows:
        texts = _wrapped(prompt or "(no prompt)", font, canvas_width - 2)
        lines += [(top + place * line, text) for place, text in enumerate(texts)]
        tops[prompt] = top + len(texts) * line + gap
        top = tops[prompt] + height + gap
    seen: Counter[str] = Counter()
    corners = []
    for picture in pictures:
        corners.append((seen[picture.prompt] * (width + gap), tops[picture.prompt]))
        seen[picture.prompt] += 1
    return _Layout((canvas_width, top - gap), tuple(corners), tuple(lines), font)


def _draw(pictures: Sequence[Picture], layout: _Layout) -> Image.Image:
    canvas = Image.new("RGB", layout.size, "white")
    ink = ImageDraw.Draw(canvas)
    for top, text in layout.lines:
        ink.text((1, top), text, fill="black", font=layout.font)
    for picture, corner in zip(pictures, layout.corners, strict=True):
        canvas.paste(Image.fromarray(picture.image), corner)
    return canvas


def write_comparison(
    directory: epath.Path, before: Sequence[Picture], after: Sequence[Picture], about: Mapping[str, Any]
) -> None:
    """Writes `compare.png`, pairs of pictures with the brightness under each, and `compare.json`."""
    pairs = [
        {**_record(first), "before": round(first.brightness, 5), "after": round(second.brightness, 5)}
        for first, second in zip(before, after, strict=True)
    ]
    for pair in pairs:
        pair.pop("brightness")
    text = json.dumps({**about, "records": pairs}, indent=1) + "\n"
    write_all({directory / "compare.png": _png(side_by_side(before, after)), directory / "compare.json": text})


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


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
