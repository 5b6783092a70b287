"""A folder of pictures and captions: as for Hugging Face's `imagefolder`, for kohya's scripts, or with text files.

One walk decides what is there. A caption is in the table of the picture's folder or of one above, which `metadata.py`
reads, or else in `name.txt`, `name.caption` or `name.json` beside `name.png`. Regular files within the folder are read,
also by links within it; all else is passed over and counted.

Where all pictures lie in folders called `train`, `validation` or `test`, those are splits. A folder `10_a cat` is
kohya's: its pictures are seen ten times an epoch, and "a cat" is the caption of those without one.
"""

import os
import pathlib
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby

from offsetjax.data.captions import SIDE_SUFFIXES, TextLines, check_template, of_label, read_side_file
from offsetjax.data.items import MAX_PICTURE_BYTES, SPLITS, SUFFIXES, Dropped, Item, Listing, Named, digest_of, writable
from offsetjax.data.metadata import Row, inside, is_metadata, read_metadata, same_name
from offsetjax.errors import Status, UserError, kind_of
from offsetjax.storage.retry import retried

NO_CAPTION = "no caption"
_SYSTEM = frozenset(("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"))
_TABLES = "tables that are not called metadata (rename them, if captions are in them)"
_UNREAD = dict.fromkeys((".csv", ".tsv", ".jsonl"), _TABLES)
_KOHYA = re.compile(r"(\d{1,3})_(.+)")


@dataclass
class Found:
    """What a walk found below a folder, by names relative to it with `/`.

    Attributes:
        files: all regular files that are neither hidden nor led to from outside.
        stamps: when each was last changed, in nanoseconds.
        passed: what was passed over, counted by why.
        why: why each of these was.
    """

    files: dict[str, pathlib.Path] = field(default_factory=dict)
    stamps: dict[str, int] = field(default_factory=dict)
    passed: Counter[str] = field(default_factory=Counter)
    why: dict[str, str] = field(default_factory=dict)

    def passes(self, name: str, why: str) -> None:
        """Notes what is passed over."""
        self.passed[why] += 1
        self.why[name] = why


def walk(root: pathlib.Path, follow_links: bool = False) -> Found:
    """All that lies below a folder.

    Args:
        follow_links: whether links may lead out of it.
    """
    found, home = Found(), os.path.realpath(root)
    _walk(root, "", home, {home}, follow_links, found)
    return found


def _walk(folder: pathlib.Path, name: str, home: str, above: set[str], follow_links: bool, found: Found) -> None:
    for entry in retried(lambda: sorted(os.scandir(folder), key=lambda each: each.name), str(folder)):
        here = f"{name}/{entry.name}" if name else entry.name
        if entry.name.startswith(".") or entry.name in _SYSTEM:
            found.passes(here, "hidden, or the system's own")
            continue
        target = os.path.realpath(entry.path)
        if entry.is_symlink() and not (follow_links or target == home or target.startswith(home + os.sep)):
            is_there = os.path.lexists(target)
            found.passes(here, "links that lead out (--follow_links reads them)" if is_there else "links to nothing")
            continue
        try:
            status = retried(entry.stat, entry.path)
        except OSError:
            found.passes(here, "links to nothing")
            continue
        if stat.S_ISDIR(status.st_mode):
            if target in above:
                found.passes(here, "links to a folder that they are in")
                continue
            _walk(folder / entry.name, here, home, above | {target}, follow_links, found)
        elif stat.S_ISREG(status.st_mode):
            found.files[here], found.stamps[here] = folder / entry.name, status.st_mtime_ns
        else:
            found.passes(here, "pipes, devices and sockets")


@dataclass(frozen=True)
class Entry:
    """A picture's file, and its captions or the file that has them."""

    name: str
    path: pathlib.Path
    captions: tuple[str, ...] | pathlib.Path
    reason: str = ""  # where it cannot be used
    stamp: int = 0  # when the file was last changed, in nanoseconds


@dataclass(frozen=True)
class Folder:
    """The pictures of one split of a folder."""

    entries: Sequence[Entry]
    lines: TextLines

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Named]:
        return (Named(entry.name, partial(self._item, entry)) for entry in self.entries)

    def part(self, first: int, last: int) -> "Folder":
        return Folder(self.entries[first:last], self.lines)

    def digest(self) -> str:
        return digest_of(f"{entry.name} {entry.stamp} {entry.captions}" for entry in self.entries)

    def _item(self, entry: Entry) -> Item:
        if entry.reason:
            raise Dropped(entry.reason)
        return retried(lambda: self._read(entry), str(entry.path))

    def _read(self, entry: Entry) -> Item:
        try:
            captions = entry.captions
            if isinstance(captions, pathlib.Path):
                captions = read_side_file(captions, self.lines)
            if not captions:
                raise Dropped("empty caption")
            if (size := entry.path.stat().st_size) > MAX_PICTURE_BYTES:
                raise Dropped(f"a file of more than {MAX_PICTURE_BYTES} bytes: {size}")
            return Item(entry.name, entry.path.read_bytes(), captions)
        except OSError as error:
            if kind_of(error) == Status.TRANSIENT:
                raise
            raise Dropped(f"cannot be read: {error.strerror}") from error


def list_folder(
    images_dir: str | os.PathLike,
    *,
    lines: TextLines = "whole",
    repeats: bool = True,
    follow_links: bool = False,
    label_template: str = "",
) -> Listing:
    """The pictures below a folder and those that a metadata file names, sorted, by splits.

    Args:
        lines: which lines of a text file are captions.
        repeats: whether folders called `10_a cat` are kohya's.
        follow_links: whether links may lead out of the folder.
        label_template: the caption of a picture that has none, where `{label}` is the name of its folder; "": none.

    Raises:
        UserError: no folder, or no pictures in it.
        TransientError: it could not be read, which may pass.
    """
    if label_template:
        check_template("--label_template", label_template)
    root = pathlib.Path(images_dir)
    if not root.is_dir():
        raise UserError(f"data: {images_dir} is not a folder; give the folder of the pictures")
    found = walk(root, follow_links)
    rows, dropped = _metadata(root, found)
    entries = [_entry(found, rows, name, repeats, label_template) for name in _pictures(found, rows)]
    if not entries:
        raise UserError(f"data: {images_dir} holds no pictures ({' '.join(sorted(SUFFIXES))}){_shown(found.passed)}")
    used = {str(entry.captions) for entry in entries if isinstance(entry.captions, pathlib.Path)}
    names = {entry.name for entry in entries}
    for name, path in found.files.items():
        if name not in names and str(path) not in used and not is_metadata(path.name):
            found.passes(name, _UNREAD.get(path.suffix.lower(), "files that are neither pictures nor read as captions"))
    splits, notes = _splits(entries)
    counted = {split: _repeats(of_split) for split, of_split in splits.items()} if repeats else {}
    notes += _kohya_notes(entries) if repeats else []
    return Listing(
        splits={split: Folder(of_split, lines) for split, of_split in splits.items()},
        repeats={split: runs for split, runs in counted.items() if any(times != 1 for _, times in runs)},
        dropped=dropped,
        passed=found.passed,
        notes=notes,
    )


def _shown(passed: Mapping[str, int]) -> str:
    return "; passed over: " + ", ".join(f"{count} {why}" for why, count in passed.items()) if passed else ""


def _metadata(root: pathlib.Path, found: Found) -> tuple[dict[str, Row | Dropped], list[tuple[str, str]]]:
    """The rows of all metadata files, by the names of their pictures; and what is no row."""
    rows: dict[str, Row | Dropped] = {}
    dropped: list[tuple[str, str]] = []
    stems: dict[str, list[str]] = {}
    for name in found.files:
        if pathlib.PurePosixPath(name).suffix.lower() in SUFFIXES:
            stems.setdefault(same_name(os.path.splitext(name)[0]), []).append(name)  # noqa: PTH122 - it is no path
    for place, path in found.files.items():
        if not is_metadata(path.name):
            continue
        folder, of_file = pathlib.PurePosixPath(place).parent, dict[str, Row]()
        for row in retried(lambda path=path, place=place: list(read_metadata(path, place)), str(path)):  # type: ignore[misc]
            if not isinstance(row, Row):
                dropped.append(row)
                continue
            try:
                name = same_name(inside(folder, row.file_name, root))
            except Dropped as error:
                dropped.append((row.place, str(error)))
                continue
            if name not in found.files and len(of_stem := stems.get(name, [])) == 1:
                name = same_name(of_stem[0])
            before = of_file.get(name)
            of_file[name] = replace(before, captions=_distinct(before.captions + row.captions)) if before else row
        for name, row in of_file.items():
            rows[name] = Dropped(f"several captions: the second in {row.place}") if name in rows else row
    return rows, dropped


def _distinct(captions: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(captions))


def _pictures(found: Found, rows: Mapping[str, Row | Dropped]) -> list[str]:
    """The names of all pictures: by their suffix, or because a row names them, whether they are there or not."""
    there = {same_name(name): name for name in found.files}
    pictures = {name for name in found.files if pathlib.PurePosixPath(name).suffix.lower() in SUFFIXES}
    return sorted(pictures | {there.get(name, name) for name in rows})


def _entry(found: Found, rows: Mapping[str, Row | Dropped], name: str, is_kohya: bool, template: str) -> Entry:
    path, row = found.files.get(name), rows.get(same_name(name))
    reason = ""
    if not writable(name):
        reason = "its name is not UTF-8"
    elif path is None:
        why = found.why.get(name)
        reason = "named in a metadata file, but " + (f"passed over as one of the {why}" if why else "missing")
    elif isinstance(row, Dropped):
        reason = str(row)
    if reason or path is None:
        return Entry(name.encode("utf-8", "backslashreplace").decode(), path or pathlib.Path(), (), reason)
    captions = row.captions if isinstance(row, Row) else _beside(found, name, is_kohya, template)
    reason = captions if isinstance(captions, str) else ""
    return Entry(name, path, () if isinstance(captions, str) else captions, reason, found.stamps[name])


def _beside(found: Found, name: str, is_kohya: bool, template: str) -> tuple[str, ...] | pathlib.Path | str:
    """The caption of a picture that no row names, or the file beside it that has one; or why there is none."""
    stems = (os.path.splitext(name)[0], name)  # noqa: PTH122 - it is no path
    for suffix in SIDE_SUFFIXES:
        for stem in stems:
            for written in (suffix, suffix.upper()):
                if stem + written in found.files:
                    return found.files[stem + written]
    folder = _kohya_folder(name) if is_kohya else None
    label = (folder[1] if folder else pathlib.PurePosixPath(name).parent.name).replace("_", " ").strip()
    if label and (folder or template):
        return (of_label(template or "{label}", label),)
    near = [why for other, why in found.why.items() if os.path.splitext(other)[0] == stems[0]]  # noqa: PTH122
    beside = f" (beside it lies one of the {near[0]})" if near else ""
    return f"{NO_CAPTION}: neither a line in metadata.jsonl nor a text file beside it{beside}"


def _kohya_folder(name: str) -> tuple[int, str] | None:
    """How often, and what: (10, "a cat") for `10_a cat/picture.png`."""
    match = _KOHYA.fullmatch(pathlib.PurePosixPath(name).parent.name)
    return (int(match[1]), match[2]) if match and int(match[1]) else None


def _repeats(entries: Sequence[Entry]) -> list[tuple[int, int]]:
    times = [(_kohya_folder(entry.name) or (1, ""))[0] for entry in entries]
    return [(len(list(same)), each) for each, same in groupby(times)]


def _kohya_notes(entries: Sequence[Entry]) -> list[str]:
    counts = Counter(
        (pathlib.PurePosixPath(entry.name).parent.name, folder[0])
        for entry in entries
        if (folder := _kohya_folder(entry.name))
    )
    return [f"{count} pictures of {name} are seen {times} times an epoch" for (name, times), count in counts.items()]


def _splits(entries: Sequence[Entry]) -> tuple[dict[str, list[Entry]], list[str]]:
    """The entries by splits, and what is to be said of it: their folders are the first that not all are in."""
    depth = len(pathlib.PurePosixPath(os.path.commonpath([os.path.dirname(each.name) for each in entries])).parts)  # noqa: PTH120

    def top(entry: Entry) -> str:
        return next(iter(pathlib.PurePosixPath(entry.name).parent.parts[depth:]), "")

    tops = {top(entry) for entry in entries}
    known = {each: SPLITS[each.lower()] for each in tops if each.lower() in SPLITS}
    if len(known) == len(tops) and "train" in known.values():
        splits: dict[str, list[Entry]] = {}
        for entry in entries:
            splits.setdefault(known[top(entry)], []).append(entry)
        return dict(sorted(splits.items(), key=lambda each: each[0] != "train")), []
    notes = [f"{', '.join(sorted(known))} are no splits, as pictures lie beside them"] if len(known) > 1 else []
    return {"train": list(entries)}, notes
