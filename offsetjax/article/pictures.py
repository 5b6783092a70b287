"""Procedural pictures of known brightness, for the re-enactment of "Diffusion with Offset Noise".

The article's four prompts each name a range of brightness, from a torch-lit square (nearly black) to a logo on white.
A picture's brightness is the mean of all its RGB values over 255: 0 is black, 1 is white. Every picture is drawn as
a smooth scene and then raised to the power that gives it exactly the brightness asked for, so that what a model
generates can be compared with the distribution that it was shown.
"""

import json
from collections.abc import Callable, Iterable

import numpy as np
from etils import epath
from PIL import Image

SQUARE = "a town square lit only by torchlight"
ALLEY = "a dark alley in a rainstorm"
SLOPE = "a ski slope on a sunny day"
LOGO = "a line-art logo on a white ground"

PROMPTS: tuple[str, ...] = (SQUARE, ALLEY, SLOPE, LOGO)
BRIGHTNESS_RANGES: dict[str, tuple[float, float]] = {
    SQUARE: (0.02, 0.10),
    ALLEY: (0.02, 0.50),
    SLOPE: (0.50, 0.98),
    LOGO: (0.90, 0.98),
}
ANY_BRIGHTNESS = (0.02, 0.98)
BLACK_PROMPT = "all black"

# No value is quite black or white before the power is applied, so that every brightness can be reached.
_DARKEST, _BRIGHTEST = 0.004, 0.996


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (y, x) of the pixel centres, each `[size, size]`, from 0 at the top left to 1."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    return np.meshgrid(axis, axis, indexing="ij")


def _inside(distance: np.ndarray, softness: float) -> np.ndarray:
    """Coverage in [0, 1] from a signed distance (negative inside): an edge `softness` wide."""
    return np.clip(0.5 - distance / softness, 0.0, 1.0)


def _mix(image: np.ndarray, coverage: np.ndarray, colour: Iterable[float] | np.ndarray) -> np.ndarray:
    """Paints `colour` ([3] or [h, w, 3]) over `image` [h, w, 3] where `coverage` [h, w] is 1."""
    return image + coverage[..., None] * (np.asarray(colour, np.float32) - image)


def _shade(grey: np.ndarray, tint: Iterable[float]) -> np.ndarray:
    return grey[..., None] * np.asarray(tint, np.float32)


def _town_square(y: np.ndarray, x: np.ndarray, rng: np.random.Generator, _: float) -> np.ndarray:
    soft = 2.0 / len(y)
    ground = rng.uniform(0.66, 0.76)
    image = _shade(0.13 - 0.08 * y, (0.95, 0.97, 1.05))
    left = -rng.uniform(0.0, 0.1)
    while left < 1.0:  # a row of houses, some of them gabled, across the picture
        width, top = rng.uniform(0.16, 0.28), rng.uniform(0.26, 0.46)
        slope = rng.choice((0.0, 0.7, 1.1))
        centre = left + width / 2
        roof = top + slope * np.abs(x - centre)
        house = _inside(np.maximum(np.maximum(left - x, x - left - width), roof - y), soft)
        image = _mix(image, house, np.full(3, rng.uniform(0.025, 0.05), np.float32))
        left += width
    image = _mix(image, _inside(ground - y, soft), _shade(0.07 + 0.1 * (y - ground), (1.03, 1.0, 0.96)))
    count = int(rng.integers(2, 5))
    for place in (np.arange(count) + rng.uniform(0.25, 0.75, count)) / count:
        height = ground - rng.uniform(0.04, 0.16)
        square = (x - place) ** 2 + (y - height) ** 2
        pool = np.exp(-(((x - place) / 0.16) ** 2) - ((y - ground - 0.08) / 0.06) ** 2)
        glow = 0.22 * np.exp(-square / 0.02) + 0.8 * np.exp(-square / 0.0011) + 0.16 * pool
        image = image + _shade(glow, (1.0, 0.86, 0.68))
        post = _inside(np.maximum(np.abs(x - place) - 0.008, np.maximum(height + 0.03 - y, y - ground - 0.06)), soft)
        image = _mix(image, post, (0.04, 0.035, 0.03))
    return image


def _alley(y: np.ndarray, x: np.ndarray, rng: np.random.Generator, _: float) -> np.ndarray:
    soft = 2.0 / len(y)
    centre, horizon = rng.uniform(0.38, 0.62), rng.uniform(0.42, 0.55)
    dx, dy = x - centre, y - horizon
    wall = 0.34 + 0.16 * np.clip(np.abs(dx) * 2, 0, 1)
    depth = np.maximum(np.abs(dx), 0.04)
    bands = np.cos(dy / depth * rng.uniform(5.0, 8.0)) * np.clip(np.abs(dx) * 3 - 0.2, 0, 1)
    image = _shade(wall + 0.04 * bands, (0.96, 1.0, 1.07))
    side = rng.uniform(0.75, 1.25)  # one wall catches more light than the other
    image = image * np.where(dx < 0, side, 2 - side)[..., None]
    sky = _inside(np.abs(dx) + 0.55 * dy, soft)
    image = _mix(image, sky, _shade(0.62 + 0.2 * dy, (0.95, 1.0, 1.08)))
    floor = _inside(np.abs(dx) - 1.25 * dy, soft)
    wet = 0.30 + 0.22 * np.exp(-((dx / 0.1) ** 2)) * np.exp(-dy * 2)
    image = _mix(image, floor, _shade(wet, (0.97, 1.0, 1.05)))
    lamp_x, lamp_y = centre + rng.uniform(-0.12, 0.12), horizon - rng.uniform(0.02, 0.14)
    image = image + _shade(0.3 * np.exp(-((x - lamp_x) ** 2 + (y - lamp_y) ** 2) / 0.004), (1.0, 0.98, 0.94))
    lean = rng.uniform(-0.35, 0.35)
    rain = np.zeros_like(x)
    for start, top in rng.uniform(-0.2, 1.2, (13, 2)):
        across = (x - start - lean * (y - 0.5)) * len(y) / 1.3
        along = (y - top) / rng.uniform(0.10, 0.2)
        rain += np.exp(-(across**2)) * np.clip(1 - along**2, 0, 1)
    return image + _shade(0.16 * np.minimum(rain, 1), (0.97, 1.0, 1.04))


def _ski_slope(y: np.ndarray, x: np.ndarray, rng: np.random.Generator, _: float) -> np.ndarray:
    soft = 2.0 / len(y)
    image = _shade(0.52 + 0.26 * y, (0.88, 0.98, 1.12))
    sun_x, sun_y = rng.uniform(0.1, 0.9), rng.uniform(0.08, 0.22)
    sun = np.hypot(x - sun_x, y - sun_y)
    image = image + _shade(0.22 * np.exp(-((sun / 0.16) ** 2)), (1.0, 0.97, 0.85))
    image = _mix(image, _inside(sun - rng.uniform(0.045, 0.07), 2 * soft), (1.0, 0.97, 0.86))
    far = 0.42 + 0.05 * np.sin(x * rng.uniform(9, 14) + rng.uniform(0, 6)) + 0.03 * np.sin(x * 23 + rng.uniform(0, 6))
    image = _mix(image, _inside(far - y, soft), _shade(0.70 + 0.2 * (y - 0.4), (0.95, 0.99, 1.05)))
    tilt = rng.uniform(0.12, 0.4) * rng.choice((-1.0, 1.0))
    line = rng.uniform(0.5, 0.6) + tilt * (x - 0.5) + 0.03 * np.sin(x * 5 + rng.uniform(0, 6))
    below = y - line
    tracks = np.sin((x - tilt * y) * 30 + 4 * np.sin(y * 6 + rng.uniform(0, 6))) * np.clip(below * 4, 0, 1)
    snow = 0.97 - 0.12 * np.clip(below, 0, 1) + 0.015 * tracks
    image = _mix(image, _inside(-below, soft), _shade(snow, (0.99, 1.0, 1.01)))
    for place in rng.uniform(0.05, 0.95, int(rng.integers(2, 5))):  # firs at the edge of the slope
        foot = np.interp(place, x[0], line[0]) + rng.uniform(0.01, 0.08)
        height = rng.uniform(0.10, 0.18)
        fir = np.maximum(np.abs(x - place) - 0.28 * (y - foot + height), y - foot)
        image = _mix(image, _inside(fir, soft), (0.38, 0.43, 0.42))
    return image


def _logo(y: np.ndarray, x: np.ndarray, rng: np.random.Generator, brightness: float) -> np.ndarray:
    soft = 2.0 / len(y)
    centre_x, centre_y = rng.uniform(0.42, 0.58, 2)
    radius = rng.uniform(0.2, 0.3)
    angle = rng.uniform(0, 2 * np.pi)
    dx, dy = x - centre_x, y - centre_y
    u, v = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
    ring = np.abs(np.hypot(dx, dy) - radius)
    inner = 0.6 * radius
    figure, length = [
        (np.abs(np.maximum(np.abs(u), np.abs(v)) - inner * 0.8), 6.4 * inner),  # a square
        (np.abs(np.maximum(-v - inner / 2, np.abs(u) * 0.866 + v / 2 - inner / 2)), 5.2 * inner),  # a triangle
        (np.abs(np.hypot(u, v) - inner), 6.3 * inner),  # a second ring
        (np.maximum(np.minimum(np.abs(u), np.abs(v)), np.hypot(u, v) - radius), 4.0 * radius),  # a cross
    ][int(rng.integers(4))]
    # The ink takes up the share of the picture that the brightness leaves, so that the ground stays white. Darker than
    # any logo on white, the strokes stay as they are and the ground darkens.
    width = (0.985 - max(brightness, BRIGHTNESS_RANGES[LOGO][0]) + 0.008) / 0.8 / (2 * np.pi * radius + length)
    ink = _inside(np.minimum(ring, figure) - width / 2, max(soft, width / 4))
    tint = rng.uniform(0.12, 0.22) + np.array([rng.uniform(-0.03, 0.03), 0.0, rng.uniform(-0.03, 0.03)], np.float32)
    return _mix(np.full((*y.shape, 3), 0.985, np.float32), ink, tint)


_SCENES: dict[str, Callable[[np.ndarray, np.ndarray, np.random.Generator, float], np.ndarray]] = {
    SQUARE: _town_square,
    ALLEY: _alley,
    SLOPE: _ski_slope,
    LOGO: _logo,
}


def draw(prompt: str, brightness: float, rng: np.random.Generator, size: int = 128) -> np.ndarray:
    """Draws one picture for a prompt.

    Args:
        prompt: one of `PROMPTS`.
        brightness: the mean of all RGB values over 255, above 0 and below 1.
        rng: decides on the arrangement of the scene.
        size: height and width in pixels.

    Returns:
        `[size, size, 3]` uint8, its mean brightness within .004 of the one asked for.
    """
    scene = _SCENES[prompt](*_grid(size), rng, brightness)
    logarithm = np.log(np.clip(scene, _DARKEST, _BRIGHTEST).astype(np.float32))
    low, high = -9.0, 9.0  # of the base-2 logarithm of the exponent; more of it is darker
    for _ in range(14):
        middle = (low + high) / 2
        too_bright = np.exp(logarithm * np.float32(2.0**middle)).mean() > brightness
        low, high = (middle, high) if too_bright else (low, middle)
    return np.rint(np.exp(logarithm * np.float32(2.0**high)) * 255).astype(np.uint8)


def _write(out: str, pictures: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes `[h, w, 3]` uint8 pictures as PNG, with metadata.jsonl in the form of a Hugging Face image folder."""
    folder = epath.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, (caption, picture) in enumerate(pictures):
        name = f"{index:05d}.png"
        with (folder / name).open("wb") as file:
            Image.fromarray(picture).save(file, "PNG")
        lines.append(json.dumps({"file_name": name, "text": caption}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))


def write_folder(out: str, count: int, seed: int) -> None:
    """Writes a pretraining set: as many pictures a prompt, each of any brightness, in random order.

    A caption names the scene and says nothing of its light, as most captions do.
    """
    order = np.random.default_rng(seed).permutation(count)

    def pictures() -> Iterable[tuple[str, np.ndarray]]:
        for index, place in enumerate(order):
            rng = np.random.default_rng((seed, index))
            prompt = PROMPTS[place % len(PROMPTS)]
            yield prompt, draw(prompt, rng.uniform(*ANY_BRIGHTNESS), rng)

    _write(out, pictures())


def write_fine_tuning_folder(out: str, seed: int, count_per_prompt: int = 10) -> None:
    """Writes the article's 40 pictures: 10 a prompt, their brightness spread evenly over the range of the prompt."""

    def pictures() -> Iterable[tuple[str, np.ndarray]]:
        for row, prompt in enumerate(PROMPTS):
            for column, brightness in enumerate(np.linspace(*BRIGHTNESS_RANGES[prompt], count_per_prompt)):
                yield prompt, draw(prompt, float(brightness), np.random.default_rng((seed, row, column)))

    _write(out, pictures())


def write_black_picture(out: str, size: int = 128) -> None:
    """Writes the article's control: a single black picture, captioned `BLACK_PROMPT`."""
    _write(out, [(BLACK_PROMPT, np.zeros((size, size, 3), np.uint8))])
