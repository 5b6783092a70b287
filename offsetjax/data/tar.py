"""Tars as webdataset and img2dataset write them: the members of an example share what stands before the first dot.

`000.jpg` has its caption in `000.txt`, `000.caption` or `000.json`, wherever in the file these lie. A tar is read at
the places that its headers name and never unpacked. Its headers are a stranger's: names that lead out of it, links and
devices are not read, and a header that claims more than the file holds ends it.
"""

import io
import os
import pathlib
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int

from offsetjax.data.archives import Archive, Damaged, Reader, Settings, file_digest
from offsetjax.data.captions import SIDE_SUFFIXES, check_template, of_label, side_captions
from offsetjax.data.folder import NO_CAPTION
from offsetjax.data.items import MAX_CAPTION_BYTES, MAX_PICTURE_BYTES, SUFFIXES, Dropped, Item, Named, writable
from offsetjax.data.metadata import is_metadata
from offsetjax.data.opened import Opened
from offsetjax.errors import Status, kind_of, one_line

_MOST_HEADER = 2**20  # bytes of one, with the long names and attributes before it
_MOST_BLANK = 16  # reads behind the end of the file
_NONE = -1  # no caption


@dataclass(frozen=True)
class Tar:
    """The pictures of a tar, or some of them.

    Attributes:
        name: of the tar, before the names of its members.
        names: of the pictures.
        places: of each, offset and size of the picture; offset, size and number in `SIDE_SUFFIXES` of its caption.
    """

    path: epath.Path
    name: str
    settings: Settings
    names: tuple[bytes, ...]
    places: Int[np.ndarray, "n 5"]
    identity: str

    def __len__(self) -> int:
        return len(self.names)

    def part(self, first: int, last: int) -> "Tar":
        return Tar(self.path, self.name, self.settings, self.names[first:last], self.places[first:last], self.identity)

    def digest(self) -> str:
        return self.identity

    def __iter__(self) -> Iterator[Named]:
        with Opened(self.path) as file:
            for name, place in zip(self.names, self.places.tolist(), strict=True):
                member = name.decode()
                image, caption = _content(file, *place[:2]), _content(file, *place[2:4])
                yield Named(f"{self.name}/{member}", partial(self._item, member, image, caption, place[4]))

    def _item(self, member: str, image: bytes | Dropped, caption: bytes | Dropped, side: int) -> Item:
        for each in (image, caption):
            if isinstance(each, Dropped):
                raise each
        assert isinstance(image, bytes) and isinstance(caption, bytes)
        if side != _NONE:
            captions = side_captions(caption, SIDE_SUFFIXES[side], self.settings.lines)
        else:
            label = pathlib.PurePosixPath(member).parent.name.replace("_", " ").strip()
            if not self.settings.label_template or not label:
                raise Dropped(f"{NO_CAPTION}: the tar has no .txt, .caption or .json of its name")
            captions = (of_label(self.settings.label_template, label),)
        if not captions:
            raise Dropped("empty caption")
        return Item(f"{self.name}/{member}", image, captions)


def _content(file: Opened, offset: int, size: int) -> bytes | Dropped:
    if size > MAX_PICTURE_BYTES:
        return Dropped(f"a file of more than {MAX_PICTURE_BYTES} bytes: {size}")
    file.seek(offset)
    found = file.read(size) if size else b""
    return found if len(found) == size else Dropped("the tar ends in it")


def open_tar(path: epath.Path, name: str, settings: Settings) -> Archive:
    """Reads the headers of a tar.

    Raises:
        Damaged: it is none, or there is nothing of it.
    """
    if settings.label_template:
        check_template("--label_template", settings.label_template)
    identity = file_digest(path, name, settings)
    found = _Members(name)
    with Opened(path) as file:
        damage = found.read(file)
    if damage and not found.count:
        raise Damaged(damage)
    names, places = found.pictures()
    items = Tar(path, name, settings, tuple(names), places, identity)
    return Archive(items, found.dropped, found.passed, damage)


TAR = Reader(open_tar, frozenset(("lines", "label_template")))


class _Members:
    """The members of a tar, gathered by example."""

    def __init__(self, name: str):
        self.count = 0
        self.dropped: list[tuple[str, str]] = []
        self.passed: Counter[str] = Counter()
        self._name = name
        self._examples: dict[str, dict[str, tuple[int, int]]] = {}

    def read(self, file: Opened) -> str:
        """Reads all headers; what is wrong with the tar, or ""."""
        end, before = 0, -1
        try:
            with tarfile.open(fileobj=_Careful(file), mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                    if member.offset <= before or member.size < 0:
                        return f"the header at byte {member.offset} is none"
                    before, end = member.offset, tar.offset
                    if member.isreg() and member.offset_data + member.size > file.size:
                        return f"it ends in {member.name[:80]!r}, after {file.size} bytes"
                    self.count += 1
                    self._add(member)
                end = tar.offset
        except Exception as error:  # of bytes that have changed the reader raises many kinds
            if kind_of(error) in (Status.TRANSIENT, Status.STORAGE):
                raise
            return f"not a tar, or cut: {one_line(error)}"
        return _end(file, end)

    def _add(self, member: tarfile.TarInfo) -> None:
        name = member.name.removeprefix("./")
        path = pathlib.PurePosixPath(name)
        if member.isdir():
            return
        if any(part.startswith(".") or part == "__MACOSX" for part in path.parts if part != ".."):
            self.passed["hidden, or the system's own"] += 1
        elif not member.isreg() or member.issparse():
            self.passed["links, devices and sparse members of tars"] += 1
        elif not writable(name):
            self._drop(name, "its name is not UTF-8")
        elif path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
            self._drop(name, f"its name leads out of the tar: {name[:80]!r}")
        elif is_metadata(path.name):
            self.passed["metadata files in tars (unpack them, and give the folder)"] += 1
        else:
            key, dot, suffix = path.name.partition(".")
            members = self._examples.setdefault(str(path.with_name(key)) if key else name, {})
            if dot + suffix in members:
                self._drop(name, "several members of its name: the second is not read")
            else:
                members[dot + suffix] = (member.offset_data, member.size)

    def _drop(self, name: str, reason: str) -> None:
        self.dropped.append((f"{self._name}/{name.encode('utf-8', 'backslashreplace').decode()}", reason))

    def pictures(self) -> tuple[list[bytes], Int[np.ndarray, "n 5"]]:
        """The names and the places of the pictures, as `Tar` has them."""
        names, places = [], []
        for key, members in self._examples.items():
            for stem, of_stem in _examples(key, members).items():
                suffixes = [suffix for suffix in of_stem if suffix.lower() in SUFFIXES]
                if len(suffixes) > 1:
                    self._drop(stem + suffixes[0], f"several pictures of one name: {' '.join(suffixes)}")
                    continue
                if not suffixes:
                    self.passed["members of tars that belong to no picture"] += len(of_stem)
                    continue
                sides = {suffix.lower(): suffix for suffix in of_stem}
                side = next((number for number, each in enumerate(SIDE_SUFFIXES) if each in sides), _NONE)
                caption = (0, 0) if side == _NONE else of_stem[sides[SIDE_SUFFIXES[side]]]
                size = min(caption[1], MAX_CAPTION_BYTES + 1)  # one that is longer is refused for it
                names.append((stem + suffixes[0]).encode())
                places.append((*of_stem[suffixes[0]], caption[0], size, side))
        return names, np.array(places, np.int64).reshape(-1, 5)


def _examples(key: str, members: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Usually one. Where no member is `key.jpg`, names have dots of their own, as `a.b.jpg`, and end at the last."""
    if any(suffix.lower() in SUFFIXES for suffix in members):
        return {key: members}
    found: dict[str, dict[str, Any]] = {}
    for suffix, place in members.items():
        stem, last = os.path.splitext(key + suffix)  # noqa: PTH122 - it is no path
        found.setdefault(stem, {})[last] = place
    return found


def _end(file: Opened, offset: int) -> str:
    """What is wrong with the end of a tar: it is a block of zeros, with zeros behind it."""
    file.seek(offset)
    if file.size - offset > _MOST_HEADER:
        return f"it has {file.size - offset} bytes behind its end, such as another tar"
    rest = file.read(_MOST_HEADER)
    if len(rest) < tarfile.BLOCKSIZE:
        return f"it has no end: it was cut after {file.size} bytes"
    return "it has bytes behind its last member that are no header" if rest.strip(b"\0") else ""


class _Careful(io.RawIOBase):
    """A file for Python's reader of tars, which may ask for as much as a header claims, and for ever."""

    def __init__(self, file: Opened):
        super().__init__()
        self._file, self._blank = file, 0

    def read(self, size: int = -1) -> bytes:
        """The next bytes, of a header."""
        if not 0 <= size <= _MOST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        found = self._file.read(size)
        self._blank += not found
        if self._blank > _MOST_BLANK:
            raise tarfile.ReadError("it ends in a header")
        return found

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Goes to a place."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """The place of the next byte."""
        return self._file.tell()
