"""Captioned pictures packed as other programs do it: tars, and tables in Parquet."""

import io
import json
import pathlib
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Pictures = Mapping[str, tuple[bytes, str]]  # the content of a file and its caption, by the file's name


def drawn(count: int, first: int = 0, side: int = 8) -> Pictures:
    """Pictures of noise."""
    pictures = {}
    for number in range(first, first + count):
        buffer = io.BytesIO()
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)).save(buffer, "PNG")
        pictures[f"{number:06}.png"] = (buffer.getvalue(), f"picture {number} — ö")
    return pictures


def members(pictures: Pictures, side: str = ".txt") -> dict[str, bytes]:
    """The members of a tar: as webdataset has them, or with img2dataset's .json."""
    found = {}
    for name, (image, caption) in pictures.items():
        found[name] = image
        text = (
            json.dumps({"caption": caption, "status": "success", "score": float("nan")}) if side == ".json" else caption
        )
        found[str(pathlib.PurePosixPath(name).with_suffix(side))] = text.encode()
    return found


def write_tar(
    file: pathlib.Path, content: Mapping[str, bytes], *others: tarfile.TarInfo, **options: Any
) -> pathlib.Path:
    """A tar of these members, and of others that have no content."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", **options) as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info in others:
            tar.addfile(info)
    return file


def write_table(file: pathlib.Path, columns: Mapping[str, Sequence[Any]] | pa.Table, **options: Any) -> pathlib.Path:
    """A table in Parquet."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(dict(columns)), file, **options)
    return file


def as_datasets(pictures: Pictures) -> dict[str, Sequence[Any]]:
    """The columns that Hugging Face's `datasets` writes."""
    structs = [{"bytes": image, "path": name} for name, (image, _) in pictures.items()]
    return {"image": structs, "text": [caption for _, caption in pictures.values()]}


def as_img2dataset(pictures: Pictures) -> dict[str, Sequence[Any]]:
    """The columns that img2dataset writes, with a row whose download failed."""
    images, captions = zip(*pictures.values(), strict=True)
    status = ["success"] * len(images) + ["failed_to_download"]
    return {
        "jpg": [*images, None],
        "caption": [*captions, "lost"],
        "url": ["https://x"] * len(status),
        "status": status,
    }
