"""A folder of pictures and their captions, in the Hugging Face `imagefolder` form or with text files.

A caption is the `text` (or `caption`) of the picture's line in a `metadata.jsonl` of its folder or one above, whose
`file_name` is relative to that file, or else the text of `name.txt` beside `name.png`.
"""

import json
import os
import pathlib
from collections.abc import Iterator

from offsetjax.errors import UserError

# What is taken for a picture; those that Pillow cannot read are dropped with that reason, not silently passed over.
SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
) | {".heic", ".heif", ".avif", ".jxl"}


def list_pictures(images_dir: str | os.PathLike) -> list[str]:
    """The pictures below a folder and those that a `metadata.jsonl` names, relative to it, sorted.

    Raises:
        UserError: no folder, or no pictures in it.
    """
    root = pathlib.Path(images_dir)
    if not root.is_dir():
        raise UserError(f"data: {images_dir} is not a folder; give the folder of the pictures")
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
    names = [name for name in files if not _is_hidden(name)]
    if not names:
        raise UserError(f"data: {images_dir} holds no pictures ({' '.join(sorted(SUFFIXES))})")
    return names


def read_captions(images_dir: str | os.PathLike) -> dict[str, str]:
    """The captions of every `metadata.jsonl` below a folder, by the picture's name relative to it.

    Raises:
        UserError: a malformed line, a second caption of one picture, a name that leads out of the folder.
    """
    root = pathlib.Path(images_dir)
    found: dict[str, str] = {}
    for file in sorted(root.rglob("metadata.jsonl")):
        folder = file.parent.relative_to(root)
        for place, name, caption in _read_metadata(file):
            inside = (folder / name).as_posix()
            if inside in found:
                raise UserError(f"data: {place}: a second caption for {inside}; leave one")
            found[inside] = caption
    return found


def read_text_file(images_dir: str | os.PathLike, name: str) -> str | None:
    """The text of `name.txt` beside `name.png`; None if there is none.

    Raises:
        UserError: it is not UTF-8.
    """
    file = (pathlib.Path(images_dir) / name).with_suffix(".txt")
    try:
        return file.read_text(encoding="utf-8-sig") if file.exists() else None
    except UnicodeDecodeError:
        raise UserError(f"data: {file} is not UTF-8 text; convert it") from None


def _read_metadata(file: pathlib.Path) -> Iterator[tuple[str, pathlib.PurePosixPath, str]]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"data: {file} is not UTF-8 text; convert it") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{file}:{number}"
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise UserError(f"data: {place}: not a JSON object on one line: {error}") from None
        if not isinstance(fields, dict) or not isinstance(fields.get("file_name"), str):
            raise UserError(f"data: {place}: no file_name; a line is like {_EXAMPLE}")
        caption = fields.get("text", fields.get("caption", ""))
        if not isinstance(caption, str | None):
            raise UserError(f"data: {place}: the caption is {caption!r}, not a text; a line is like {_EXAMPLE}")
        yield place, _safe_name(place, fields["file_name"]), caption or ""


_EXAMPLE = '{"file_name": "a.png", "text": "A windmill."}'


def _safe_name(place: str, text: str) -> pathlib.PurePosixPath:
    name, as_windows = pathlib.PurePosixPath(text), pathlib.PureWindowsPath(text)
    if as_windows.drive or as_windows.root or ".." in as_windows.parts or not name.parts:
        raise UserError(f"data: {place}: file_name {text!r} leads out of the folder; use names below it, without '..'")
    return name


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))
