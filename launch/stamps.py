"""A folder of captioned pictures from Tux Paint's stamps, to try offsetjax with real pictures and no download of data.

    apt-get install tuxpaint-stamps-default
    .venv/bin/python launch/stamps.py --out=runs/stamps_pictures
    launch/local.sh data build --images=runs/stamps_pictures --out=runs/stamps_data

Debian's `tuxpaint-stamps-default` (GPL-2) holds cut-out photographs and drawings with English captions. Each is put on
four grounds, so that the brightness of the pictures covers the whole range: "A windmill, on a black background."
"""

import argparse
import json
import pathlib
import sys

import numpy as np
from PIL import Image

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


def write_folder(stamps: pathlib.Path, out: pathlib.Path, size: int) -> int:
    """Writes the pictures of which something shows, and their `metadata.jsonl`; how many."""
    out.mkdir(parents=True)
    lines = []
    for number, (file, caption) in enumerate(find_stamps(stamps)):
        with Image.open(file) as image:
            stamp = image.convert("RGBA")
        for name, colour in GROUNDS.items():
            picture = place(stamp, colour, size)
            if not shows(picture, colour):
                continue
            file_name = f"{number:04}_{file.stem}_{name.replace(' ', '_')}.png"
            picture.save(out / file_name)
            lines.append(json.dumps({"file_name": file_name, "text": f"{caption}, on a {name} background."}))
    (out / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command; the exit status, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the folder to make")
    parser.add_argument("--stamps", type=pathlib.Path, default=pathlib.Path("/usr/share/tuxpaint/stamps"))
    parser.add_argument("--size", type=int, default=128, help="the side of a picture, in pixels")
    options = parser.parse_args(arguments)
    if options.size < 8:
        return _mistake(f"--size={options.size} must be at least 8")
    if not options.stamps.is_dir() or not find_stamps(options.stamps):
        return _mistake(f"{options.stamps} holds no stamps; apt-get install tuxpaint-stamps-default, or give --stamps")
    if options.out.exists():
        return _mistake(f"--out={options.out} already exists; remove it, or give another folder")
    print(f"{options.out}: {write_folder(options.stamps, options.out, options.size)} pictures")
    return 0


def _mistake(text: str) -> int:
    print(f"stamps: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
