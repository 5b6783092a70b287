"""Files that hold many pictures each: tars, tables, and what others add to them.

A format is a `Reader`, which opens one file as `Items`; `READERS` has them by the suffixes of their files. Finding the
files, their splits, and what becomes of those that are damaged is the same for all, and is here.
"""

import bisect
import itertools
import os
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from etils import epath

from offsetjax.data.captions import TextLines
from offsetjax.data.items import SPLITS, SUFFIXES, Items, Listing, Named, digest_of, shown
from offsetjax.errors import UserError
from offsetjax.files import is_remote
from offsetjax.progress import tracked
from offsetjax.registry import Registry

_AT_ONCE = 16  # files that are looked at
_MOST_NAMED = 3
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")


class Damaged(Exception):  # noqa: N818 - the house names errors by what they say
    """This file cannot be read, or not to its end; the text is the reason, in a few words."""


@dataclass(frozen=True)
class Settings:
    """What a reader may be told; each says in `Reader.settings` what it listens to.

    Attributes:
        lines: which lines of a text are captions.
        label_template: the caption of a picture that has a class alone, where `{label}` is its name; "": none.
        image_column, caption_column: of a table; "": they are found by their names.
    """

    lines: TextLines = "whole"
    label_template: str = ""
    image_column: str = ""
    caption_column: str = ""


@dataclass(frozen=True)
class Archive:
    """One file that was opened.

    Attributes:
        items: its pictures that may be used, in their order.
        dropped: (name, reason) of what is in it, but is no item.
        passed: how many of what were passed over, and why.
        damage: why there may be more in it than is seen; "": nothing is missing.
    """

    items: Items
    dropped: Sequence[tuple[str, str]] = ()
    passed: Mapping[str, int] = field(default_factory=Counter)
    damage: str = ""


@dataclass(frozen=True)
class Reader:
    """How files of a format are read.

    Attributes:
        open: a file, what it is called, and the settings → what is in it; raises `Damaged`, or a UserError where the
            settings do not fit it.
        settings: the names of those that it listens to.
    """

    open: Callable[[epath.Path, str, Settings], Archive]
    settings: frozenset[str]


READERS: Registry[Reader] = Registry(
    "--images",
    "offsetjax.readers",
    {".tar": "offsetjax.data.tar:TAR", ".parquet": "offsetjax.data.parquet:PARQUET"},
)


@dataclass(frozen=True)
class Joined:
    """The items of several files, one file after the other."""

    parts: tuple[Items, ...]

    @cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self.parts else 0

    def __iter__(self) -> Iterator[Named]:
        return itertools.chain.from_iterable(self.parts)

    def part(self, first: int, last: int) -> "Joined":
        found = []
        for place in range(bisect.bisect_right(self._ends, first), bisect.bisect_left(self._ends, last) + 1):
            begin = self._ends[place] - len(self.parts[place])
            found.append(self.parts[place].part(max(first - begin, 0), min(last, self._ends[place]) - begin))
        return Joined(tuple(found))

    def digest(self) -> str:
        return digest_of(part.digest() for part in self.parts)


def is_archive(name: str) -> bool:
    """Whether there is a reader for files of that name."""
    return pathlib.PurePosixPath(name).suffix.lower() in READERS


def list_archives(
    place: str, files: Sequence[epath.Path], settings: Settings, *, skip_damaged: bool = False
) -> Listing:
    """The pictures in files of one format, by splits.

    A table beside a tar of its name is img2dataset's list of what it was to download, and is passed over.

    Args:
        place: what the user gave, for messages.
        skip_damaged: what can be read of damaged files is taken; they are counted.

    Raises:
        UserError: files of several formats or of none, settings that do not apply, damaged files, no pictures.
    """
    root = os.path.commonpath([str(file.parent) for file in files]) if not is_remote(place) else ""
    names = {str(file): os.path.relpath(file, root) if root else str(file) for file in files}
    kept, passed = _of_one_format(place, [str(file) for file in files])
    suffix = pathlib.PurePosixPath(kept[0]).suffix.lower()
    reader = READERS[suffix]
    _check_settings(place, suffix, settings, reader)

    def opened(file: str) -> Archive | Damaged:
        try:
            return reader.open(epath.Path(file), names[file], settings)
        except Damaged as error:
            return error
        except FileNotFoundError:
            return Damaged("there is no such file")

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = list(tracked(pool.map(opened, kept), "Looking at the files", len(kept)))
    archives = {file: each for file, each in zip(kept, found, strict=True) if isinstance(each, Archive)}
    damaged = [(names[file], str(each)) for file, each in zip(kept, found, strict=True) if isinstance(each, Damaged)]
    damaged += [(names[file], each.damage) for file, each in archives.items() if each.damage]
    if damaged and not skip_damaged:
        raise UserError(_damage(place, damaged, len(kept)))
    for each in archives.values():
        passed.update(each.passed)
    empty = [file for file, each in archives.items() if not len(each.items)]
    passed.update({"files without a picture": len(empty)} if empty else {})
    filled = [file for file in archives if file not in set(empty)]
    dropped = [*damaged, *(each for archive in archives.values() for each in archive.dropped)]
    if not filled:
        counted = "; ".join(f"{count} {why}" for why, count in passed.items())
        first = "; ".join(f"{shown(name)}: {shown(reason)}" for name, reason in dropped[:_MOST_NAMED])
        raise UserError(
            f"data: {place} holds no pictures{f' ({counted})' if counted else ''}{f': {first}' if first else ''}"
        )
    splits, notes = _splits({file: names[file] for file in filled})
    joined = {split: Joined(tuple(archives[file].items for file in of_split)) for split, of_split in splits.items()}
    return Listing(splits=joined, dropped=dropped, passed=passed, notes=notes)


def _of_one_format(place: str, files: Sequence[str]) -> tuple[list[str], Counter[str]]:
    """Those that are read, all of one format, and what is passed over."""
    passed: Counter[str] = Counter()
    known = [file for file in files if is_archive(file)]
    others = [file for file in files if not is_archive(file)]
    if pictures := [file for file in others if pathlib.PurePosixPath(file).suffix.lower() in SUFFIXES]:
        what = "tars or tables and pictures" if known else "pictures"
        raise UserError(
            f"data: {place} is {what} (such as {shown(pictures[0])}); pictures are read by folders: give a folder"
            + (" of the pictures alone, or a pattern of the others alone" if known else "")
        )
    if not known:
        name = shown(others[0])
        remedy = "unpack it and give what was in it" if name.lower().endswith(_COMPRESSED) else "give one of these"
        raise UserError(f"data: {name} is not read, only folders of pictures and {' '.join(READERS.names)}; {remedy}")
    if others:
        passed["files that are no archives of pictures"] = len(others)
    stems = {os.path.splitext(file)[0] for file in known if file.lower().endswith(".tar")}  # noqa: PTH122
    tables = {file for file in known if file.lower().endswith(".parquet") and os.path.splitext(file)[0] in stems}  # noqa: PTH122
    if tables:
        passed["tables beside tars of their names"] = len(tables)
        known = [file for file in known if file not in tables]
    formats = Counter(pathlib.PurePosixPath(file).suffix.lower() for file in known)
    if len(formats) > 1:
        counted = " and ".join(f"{count} {suffix}" for suffix, count in formats.items())
        raise UserError(f"data: {place} holds {counted} files; give a pattern of one format, such as '*{min(formats)}'")
    return known, passed


def _check_settings(place: str, suffix: str, settings: Settings, reader: Reader) -> None:
    defaults = Settings()
    for name, value in vars(settings).items():
        if value != getattr(defaults, name) and name not in reader.settings:
            option = {"lines": "text_lines"}.get(name, name)
            raise UserError(f"data: --{option}={value} does not apply to {suffix} files, as {place} is; leave it out")


def _damage(place: str, damaged: Sequence[tuple[str, str]], count: int) -> str:
    first = "; ".join(f"{shown(name)}: {shown(reason)}" for name, reason in damaged[:_MOST_NAMED])
    more = f"; and {len(damaged) - _MOST_NAMED} more" if len(damaged) > _MOST_NAMED else ""
    return (
        f"data: {len(damaged)} of the {count} files of {place} are damaged ({first}{more}); copy them again, or take "
        "what can be read with --skip_damaged"
    )


def _splits(files: Mapping[str, str]) -> tuple[dict[str, list[str]], list[str]]:
    """The files by splits, as their names say: `train-00000-of-00002`, `data/test/0000`; and what is to be said of it.

    Args:
        files: their names, by their paths.
    """
    said = {
        file: {SPLITS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in SPLITS}
        for file, name in files.items()
    }
    if all(len(each) == 1 for each in said.values()) and any("train" in each for each in said.values()):
        splits: dict[str, list[str]] = {}
        for file, [split] in said.items():
            splits.setdefault(split, []).append(file)
        return dict(sorted(splits.items(), key=lambda each: each[0] != "train")), []
    known = sorted(set[str]().union(*said.values()))
    notes = [f"{', '.join(known)} are no splits, as not all files are called so"] if len(known) > 1 else []
    return {"train": list(files)}, notes


def file_digest(path: epath.Path, name: str, more: Any) -> str:
    """What identifies a file without reading it: its name, size and time of change, and how it is read."""
    status = path.stat()
    return digest_of((name, str(status.length), str(status.mtime), str(more)))
