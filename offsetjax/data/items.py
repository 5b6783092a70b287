"""What a data set is built from: pictures with their captions, one by one, wherever they lie.

A folder, tars and tables each give `Items`; `build` writes them as records. What cannot be used is `Dropped`, with a
name and a reason, and never ends a build.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from offsetjax import log

# What is taken for a picture; those that Pillow cannot read are dropped with that reason, not silently passed over.
SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
) | {".heic", ".heif", ".avif", ".jxl"}
# What folders and files of splits are called.
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
    ("validation", "valid", "val", "dev"), "validation"
)
MAX_PICTURE_BYTES = 2**28
MAX_CAPTION_BYTES = 2**16


class Dropped(Exception):  # noqa: N818 - the house names errors by what they say
    """This item cannot be used; the text is the reason: a few words that many may share, then what is its own.

    The two are set apart by a colon: `corrupt: broken data stream`.
    """


@dataclass(frozen=True)
class Item:
    """A picture as its file has it, and its captions; most have one."""

    name: str
    image: bytes
    captions: Sequence[str]
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Named:
    """A picture that is there to be read: what it is called, and a function that reads it, in any thread.

    `read` raises `Dropped` where it cannot be used.
    """

    name: str
    read: Callable[[], Item]


class Items(Protocol):
    """Pictures in their order, all or a part of them; other processes are sent it."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Named]:
        """Each of them, once; as many as its length says, those that cannot be used too."""

    def part(self, first: int, last: int) -> "Items":
        """Those from `first` up to `last`, which is not among them."""

    def digest(self) -> str:
        """What identifies these items: their names and, as far as is known without reading, their content."""


@dataclass(frozen=True)
class Listing:
    """What was found at a place.

    Attributes:
        splits: the items of each split, in the order in which they are written.
        repeats: of each split, (number of items, how often each is seen in an epoch) in their order; empty: once.
        dropped: (name, reason) of what was named or lay there, but is no item.
        passed: how many of what were passed over, and why: in words, for the summary.
        notes: what else the summary says.
    """

    splits: Mapping[str, Items]
    repeats: Mapping[str, Sequence[tuple[int, int]]] = field(default_factory=dict)
    dropped: Sequence[tuple[str, str]] = ()
    passed: Mapping[str, int] = field(default_factory=Counter)
    notes: Sequence[str] = ()


def writable(text: str) -> bool:
    """Whether a text can be written as UTF-8: a lone surrogate cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(text: str) -> str:
    """A name or a caption as a terminal may print it: what would steer the terminal, or is no text, is escaped."""
    return log.printable(text)


def digest_of(parts: Iterable[str]) -> str:
    """The SHA-256 of texts, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()
