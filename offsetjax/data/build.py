"""A folder of captioned pictures → a TFDS data set in ArrayRecord, with no tensorflow; and a look at one."""

import contextlib
import io
import json
import os
import shutil
import textwrap
import uuid
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image, ImageDraw, ImageFont

from offsetjax.data.folder import list_pictures, read_captions, read_text_file
from offsetjax.data.images import UnreadableImage, clean, resize_and_crop
from offsetjax.data.source import unreadable
from offsetjax.data.tfds import TfdsPictures, open_pictures
from offsetjax.errors import UserError
from offsetjax.progress import tracked

DROPPED_FILE = "dropped.json"
MAX_MEASURED = 10_000  # pictures that `inspect` decodes
NO_CAPTION = "no caption: neither a line in metadata.jsonl nor a text file beside it"


@dataclass(frozen=True)
class Example:
    """A picture of the folder: its record, or the reason why it has none."""

    name: str
    record: dict[str, Any] | None = None
    reason: str = ""


@dataclass(frozen=True)
class Summary:
    """What `build` made: the version folder, how many pictures it holds, and (name, reason) of those it does not."""

    path: str
    kept: int
    dropped: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        text = f"{self.path}: {self.kept} pictures"
        return f"{text}, {len(self.dropped)} dropped" + (f": {_reasons(self.dropped)}" if self.dropped else "")


class Pictures(tfds.core.GeneratorBasedBuilder):
    """Pictures with captions, as encoded in their files."""

    VERSION = tfds.core.Version("1.0.0")
    # TFDS looks beside the code for checksums of downloads, with a package (importlib_resources) that it does not
    # declare for this Python. There are no downloads here.
    code_path = None

    def __init__(self, *, examples: Iterable[tuple[str, dict[str, Any]]] = (), **kwargs: Any):
        self._examples = examples
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "caption": tfds.features.Text(),
            "name": tfds.features.Text(),
            "height": np.int32,
            "width": np.int32,
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Pictures with captions, built by offsetjax from a folder.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,  # the records keep the order of the names; the stream shuffles
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        yield from self._examples


def build(images_dir: epath.PathLike, out_dir: epath.PathLike, max_dropped: float = 0.1) -> Summary:
    """Builds the data set `pictures` from a folder and prints what it holds.

    Pictures that any decoder shows right keep their bytes; the others become PNGs of what a viewer shows. Broken
    pictures and those without a caption are left out; `dropped.json` in the data set names them with the reason.

    Args:
        images_dir: the pictures, also in folders below, captioned as `offsetjax.data.folder` says.
        out_dir: where TFDS puts `pictures/1.0.0`; it appears when it is complete.
        max_dropped: the share of the pictures that may be left out.

    Raises:
        UserError: nothing to read, malformed captions, too much to drop, or `out_dir` is there already.
    """
    out = epath.Path(out_dir)
    if not 0 <= max_dropped <= 1:
        raise UserError(f"data: --max_dropped={max_dropped} must be between 0 and 1")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"data: {out_dir} already exists; remove it, or give another folder for the data set")
    names, captions = list_pictures(images_dir), read_captions(images_dir)
    names = sorted({*names, *captions})
    dropped: list[tuple[str, str]] = []
    unfinished = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.unfinished"
    # Grain's threads clean the next pictures while one is written, and keep their order.
    options = grain.ReadOptions(num_threads=os.cpu_count() or 1, prefetch_buffer_size=32)
    read = grain.MapDataset.source(names).map(partial(_read, images_dir, captions)).to_iter_dataset(options)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `clean` refuses what it warns of
            version = _write(unfinished, _kept(read, len(names), dropped, max_dropped))
        (version / DROPPED_FILE).write_text(json.dumps(dict(dropped), indent=2) + "\n")
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    summary = Summary(str(out / version.relative_to(unfinished)), len(names) - len(dropped), tuple(dropped))
    print(summary)
    for name, reason in dropped[:5]:
        print(f"  {name}: {reason}")
    return summary


def _write(folder: epath.Path, examples: Iterable[tuple[str, dict[str, Any]]]) -> epath.Path:
    """Writes the data set into `folder`; its version folder."""
    folder.mkdir(parents=True)
    tfds.disable_progress_bar()  # rich shows ours
    builder = Pictures(examples=examples, data_dir=os.fspath(folder), file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download
        builder.download_and_prepare(download_dir=os.fspath(folder / "downloads"))
    shutil.rmtree(folder / "downloads", ignore_errors=True)
    return epath.Path(builder.data_dir)


def _kept(
    read: Iterable[Example], total: int, dropped: list[tuple[str, str]], max_dropped: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The (name, record) of each example that has one; the others are appended to `dropped`."""
    for example in tracked(read, "Reading pictures", total):
        if example.record is not None:
            yield example.name, example.record
        else:
            dropped.append((example.name, example.reason))
    if len(dropped) == total or len(dropped) > max_dropped * total:
        first = "; ".join(f"{name}: {reason}" for name, reason in dropped[:3])
        allowed = "none is left" if len(dropped) == total else f"more than --max_dropped={max_dropped} allows"
        raise UserError(
            f"data: {len(dropped)} of {total} pictures cannot be used, {allowed}: {_reasons(dropped)}; first {first}"
        )


def _read(images_dir: epath.PathLike, captions: dict[str, str], name: str) -> Example:
    caption = captions[name] if name in captions else read_text_file(images_dir, name)
    if caption is None:
        return Example(name, reason=NO_CAPTION)
    if not caption.strip():
        return Example(name, reason="empty caption")
    try:
        image, height, width = clean((epath.Path(images_dir) / name).read_bytes())
    except FileNotFoundError:
        return Example(name, reason="named in metadata.jsonl, but missing")
    except OSError as error:
        return Example(name, reason=f"cannot be read: {error.strerror}")
    except UnreadableImage as error:
        return Example(name, reason=str(error))
    record = {"image": image, "caption": caption.strip(), "name": name, "height": height, "width": width}
    return Example(name, record)


def _reasons(dropped: Sequence[tuple[str, str]]) -> str:
    counts = Counter(reason for _, reason in dropped)
    listed = ", ".join(f"{count} {reason}" for reason, count in counts.most_common(4))
    return listed + (", ..." if len(counts) > 4 else "")


def inspect(path: epath.PathLike, out: epath.PathLike | None = None, split: str = "train") -> None:
    """Prints what a data set holds: sizes, brightness, captions, what was dropped.

    Args:
        path: as for `open_source`.
        out: a PNG to write, a contact sheet of up to 24 pictures with their captions.
        split: as for `open_source`.

    Raises:
        UserError: no data set or split, or a record that cannot be decoded.
    """
    source = open_pictures(os.fspath(path), split)
    indices = np.linspace(0, len(source) - 1, min(len(source), MAX_MEASURED)).round().astype(int)
    measured = (
        grain.MapDataset.source(indices)
        .map(partial(_measure, source))
        .to_iter_dataset(grain.ReadOptions(num_threads=os.cpu_count() or 1, prefetch_buffer_size=32))
    )
    rows = list(measured)
    sides = np.array([(height, width) for height, width, _, _ in rows])
    brightness = np.array([mean for _, _, mean, _ in rows])
    texts = Counter(caption for _, _, _, caption in rows)
    some = f" (of {len(rows)} of them, evenly spaced)" if len(rows) < len(source) else ""
    print(f"{source.rows.path}, {split}: {len(source)} pictures{some}")
    low, middle, high = np.percentile(sides.min(axis=1), (0, 50, 100)).astype(int)
    print(f"shorter side: {low} to {high}, median {middle}; {len(np.unique(sides, axis=0))} distinct sizes")
    print(
        f"mean brightness (0 black, 1 white): mean {brightness.mean():.3f}, standard deviation {brightness.std():.3f}"
    )
    for edge, count in enumerate(np.histogram(brightness, 10, (0, 1))[0]):
        print(f"  {edge / 10:.1f}-{(edge + 1) / 10:.1f} {count:7d} {'#' * round(40 * count / len(rows))}")
    print(f"captions: {len(texts)} distinct; the commonest:")
    for text, count in texts.most_common(5):
        print(f"{count:8d} x {text}")
    dropped_file = epath.Path(source.rows.path) / DROPPED_FILE
    if dropped_file.exists():
        dropped = tuple(json.loads(dropped_file.read_text()).items())
        print(f"dropped when it was built: {len(dropped)}" + (f": {_reasons(dropped)}" if dropped else ""))
    if out is not None:
        _contact_sheet(source).save(os.fspath(out), "PNG")
        print(f"contact sheet: {out}")


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
        sheet.paste(Image.fromarray(resize_and_crop(_pixels(source, index), side)), (x, y))
        text = textwrap.wrap(source[index].caption, width)[:lines]
        draw.multiline_text((x, y + side + 2), "\n".join(text), fill=(255, 255, 255), font=font, spacing=1)
    return sheet
