"""A data set in one sheet: sizes, brightness, captions, what was dropped."""

import io
import os
import textwrap
from collections import Counter
from functools import partial

import grain
import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

from offsetjax import log
from offsetjax.data.buckets import square
from offsetjax.data.build import DROPPED_FILE, reasons
from offsetjax.data.images import UnreadableImage, resize_and_crop
from offsetjax.data.items import shown
from offsetjax.data.sizes import cropped, suited
from offsetjax.data.sizes_figure import sizes_figure
from offsetjax.data.source import USUAL, Features, unreadable
from offsetjax.data.tfds import TfdsPictures, open_pictures
from offsetjax.errors import one_line
from offsetjax.files import check_file, write_all
from offsetjax.json_text import parse_object
from offsetjax.plots import png

MAX_MEASURED = 10_000  # pictures that are decoded
_COUNTS, _SHOWN = (1, 3, 5, 7, 9), 7  # of sizes


def inspect(
    path: epath.PathLike,
    out: epath.PathLike | None = None,
    split: str = "train",
    features: Features = USUAL,
) -> None:
    """Prints what a data set holds: sizes, brightness, captions, what was dropped.

    Args:
        path: as for `open_source`.
        out: a PNG to write, a contact sheet of up to 24 pictures with their captions; beside it `NAME_sizes.png`, a
            figure of the sizes that suit the pictures.
        split, features: as for `open_source`.

    Raises:
        UserError: no data set or split, a record that cannot be decoded, or an `out` that cannot be written.
    """
    if out is not None:
        check_file("data", out)
        check_file("data", _figure_of_sizes(out))
    source = open_pictures(os.fspath(path), split, features)
    indices = np.linspace(0, len(source) - 1, min(len(source), MAX_MEASURED)).round().astype(int)
    rows_read = (
        grain.MapDataset.source(indices)
        .map(partial(_measure, source))
        .to_iter_dataset(grain.ReadOptions(num_threads=os.cpu_count() or 1, prefetch_buffer_size=32))
    )
    rows = list(rows_read)
    sides = np.array([(height, width) for height, width, _, _ in rows])
    brightness = np.array([mean for _, _, mean, _ in rows])
    texts = Counter(caption for _, _, _, caption in rows)
    some = f" (of {len(rows)} of them, evenly spaced)" if len(rows) < len(source) else ""
    log.show(f"{source.rows.path}, {split}: {len(source)} pictures{some}")
    low, middle, high = np.percentile(sides.min(axis=1), (0, 50, 100)).astype(int)
    log.show(f"shorter side: {low} to {high}, median {middle}; {len(np.unique(sides, axis=0))} distinct sizes")
    by_sizes = suited(sides[:, ::-1], _COUNTS, resolution=1024, step=64)
    lost = [cropped(each) for each in by_sizes]
    by_count = ", ".join(f"{loss:.1%} with {count}" for count, loss in zip(_COUNTS[1:], lost[1:], strict=True))
    log.show(f"cropped, of all pixels: {lost[0]:.1%} by squares; by chosen sizes (data.bucket_count), {by_count}")
    shown_sizes = by_sizes[_COUNTS.index(_SHOWN)]
    log.show(f"with {len(shown_sizes.sizes)} sizes, of the area of 1024x1024:")
    for size, count, loss in zip(shown_sizes.sizes, shown_sizes.counts, shown_sizes.losses, strict=True):
        log.show(f"  {size!s:>9} {count:7d} pictures, {loss:6.1%} cropped")
    log.show(
        f"mean brightness (0 black, 1 white): mean {brightness.mean():.3f}, standard deviation {brightness.std():.3f}"
    )
    for edge, count in enumerate(np.histogram(brightness, 10, (0, 1))[0]):
        log.show(f"  {edge / 10:.1f}-{(edge + 1) / 10:.1f} {count:7d} {'#' * round(40 * count / len(rows))}")
    log.show(f"captions: {len(texts)} distinct; the commonest:")
    for text, count in texts.most_common(5):
        log.show(f"{count:8d} x {shown(text)}")
    dropped_file = epath.Path(source.rows.path) / DROPPED_FILE
    if dropped_file.exists():
        log.show(f"dropped when it was built: {_dropped(dropped_file)}")
    if out is not None:
        sheet, figure = io.BytesIO(), _figure_of_sizes(out)
        _contact_sheet(source).save(sheet, "PNG")
        write_all({out: sheet.getvalue(), figure: png(sizes_figure(sides[:, ::-1], shown_sizes, _COUNTS, lost))})
        log.show(f"contact sheet: {out}; figure of the sizes: {figure}")


def _figure_of_sizes(sheet: epath.PathLike) -> epath.Path:
    """`sheet_sizes.png`, beside `sheet.png`."""
    path = epath.Path(sheet)
    return path.parent / f"{path.stem}_sizes.png"


def _dropped(file: epath.Path) -> str:
    """How many pictures, and why."""
    try:
        dropped = tuple((name, str(why)) for name, why in parse_object(file.read_bytes()).items())
    except ValueError as error:
        return f"not known, for {file} is damaged ({one_line(error)})"
    return f"{len(dropped)}: {reasons(dropped)}" if dropped else "0"


def _measure(source: TfdsPictures, index: int) -> tuple[int, int, float, str]:
    """Height, width, mean of all RGB values over 255, and the caption."""
    caption, pixels = source[index].caption, _pixels(source, index)
    height, width, _ = pixels.shape
    return height, width, float(pixels.mean()) / 255, caption


def _pixels(source: TfdsPictures, index: int) -> np.ndarray:
    try:
        return source[index].pixels()
    except UnreadableImage as error:
        raise unreadable(source, index, error) from error


def _contact_sheet(source: TfdsPictures, columns: int = 6, rows: int = 4, side: int = 160) -> Image.Image:
    lines, width = 3, 26
    indices = np.unique(np.linspace(0, len(source) - 1, min(len(source), columns * rows)).round().astype(int))
    rows, gap, text_height = -(-len(indices) // columns), 8, 14 * lines
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + text_height + gap) + gap), (128, 128, 128))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for place, index in enumerate(indices):
        x, y = gap + place % columns * (side + gap), gap + place // columns * (side + text_height + gap)
        sheet.paste(Image.fromarray(resize_and_crop(_pixels(source, index), square(side))), (x, y))
        text = textwrap.wrap(source[index].caption, width)[:lines]
        draw.multiline_text((x, y + side + 2), "\n".join(text), fill=(255, 255, 255), font=font, spacing=1)
    return sheet
