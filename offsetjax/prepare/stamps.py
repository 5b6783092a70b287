"""A folder of captioned pictures from Tux Paint's stamps, to try offsetjax with real pictures and no download of data.

    apt-get install tuxpaint-stamps-default
    launch/local.sh pictures stamps --out=runs/stamps_pictures
    launch/local.sh data build --images=runs/stamps_pictures --out=runs/stamps_data

Debian's `tuxpaint-stamps-default` (GPL-2) holds cut-out photographs and drawings with English captions. Each is put on
four grounds, so that the brightness of the pictures covers the whole range: "A windmill, on a black background."
"""

import json
import logging
import pathlib

import numpy as np
from PIL import Image

from offsetjax.errors import UserError

_log = logging.getLogger("offsetjax")
INSTALLED = "/usr/share/tuxpaint/stamps"
GROUNDS = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "grey": (128, 128, 128),
    "dark blue": (16, 24, 72),
}


def find_stamps(folder: pathlib.Path) -> list[tuple[pathlib.Path, str]]:
    """The cut-outs with a caption, sorted, as (file, caption without its full stop)."""
    found = []
    for file in sorted(folder.rglob("*.png")):
        text = file.with_suffix(".txt")
        lines = text.read_text(encoding="utf-8", errors="replace").splitlines() if text.exists() else []
        caption = lines[0].strip().rstrip(".!") if lines else ""
        if caption:
            found.append((file, caption))
    return found


def place(stamp: Image.Image, ground: tuple[int, int, int], size: int) -> Image.Image:
    """An RGBA cut-out, shrunk or enlarged to 7/8 of `size`, in the middle of a square of one colour."""
    largest = size * 7 // 8
    scale = largest / max(stamp.size)
    shape = (max(1, round(stamp.width * scale)), max(1, round(stamp.height * scale)))
    # Pillow weighs colours by their alpha, so that what hides under a transparent edge does not show.
    cut_out = stamp.resize(shape, Image.Resampling.LANCZOS)
    picture = Image.new("RGBA", (size, size), (*ground, 255))
    picture.alpha_composite(cut_out, ((size - shape[0]) // 2, (size - shape[1]) // 2))
    return picture.convert("RGB")


def shows(picture: Image.Image, ground: tuple[int, int, int]) -> bool:
    """Whether anything is to be seen: black letters are not, on black."""
    difference = np.abs(np.asarray(picture, np.int16) - np.array(ground)).max(axis=-1)
    return bool((difference > 24).mean() > 0.01)


def write_stamps(out: str, stamps: str = INSTALLED, size: int = 128) -> None:
    """Writes the pictures on which something shows, and their `metadata.jsonl`.

    Args:
        out: a folder that does not exist yet.
        stamps: a folder of cut-outs, `name.txt` with the caption beside `name.png`.
        size: the side of a picture, in pixels.

    Raises:
        UserError: an argument that cannot be.
    """
    source, folder = pathlib.Path(stamps), pathlib.Path(out)
    if size < 8:
        raise UserError(f"pictures: --size={size} must be at least 8")
    found = find_stamps(source) if source.is_dir() else []
    if not found:
        raise UserError(
            f"pictures: {source} holds no stamps; apt-get install tuxpaint-stamps-default, or give --stamps=FOLDER"
        )
    if folder.exists():
        raise UserError(f"pictures: --out={folder} already exists; give another folder")
    folder.mkdir(parents=True)
    lines = []
    for number, (file, caption) in enumerate(found):
        with Image.open(file) as image:
            stamp = image.convert("RGBA")
        for name, colour in GROUNDS.items():
            picture = place(stamp, colour, size)
            if not shows(picture, colour):
                continue
            file_name = f"{number:04}_{file.stem}_{name.replace(' ', '_')}.png"
            picture.save(folder / file_name)
            lines.append(json.dumps({"file_name": file_name, "text": f"{caption}, on a {name} background."}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _log.info("%s: %d pictures", folder, len(lines))
