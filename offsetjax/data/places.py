"""What `--images` names: a folder of pictures, a file that holds many, or a pattern of such files."""

import glob
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from etils import epath

from offsetjax.data.archives import READERS, Settings, is_archive, list_archives
from offsetjax.data.captions import TextLines
from offsetjax.data.folder import list_folder, walk
from offsetjax.data.items import SUFFIXES, Listing, shown
from offsetjax.data.metadata import is_metadata
from offsetjax.errors import UserError
from offsetjax.files import is_remote
from offsetjax.storage.retry import retried

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_FILES = 1_000_000
_LEVELS = 3  # of folders of a bucket that are looked at


def list_pictures(
    place: epath.PathLike,
    *,
    lines: TextLines = "whole",
    repeats: bool = True,
    follow_links: bool = False,
    label_template: str = "",
    image_column: str = "",
    caption_column: str = "",
    skip_damaged: bool = False,
) -> Listing:
    """The pictures of a place, by splits.

    Args:
        place: a folder, of pictures or of archives; an archive; or a pattern of archives, local or on a bucket.
        lines, label_template: as for `list_folder`.
        repeats, follow_links: as for `list_folder`; of a folder.
        image_column, caption_column: of tables; "": they are found by their names.
        skip_damaged: what can be read of damaged archives is taken.

    Raises:
        UserError: nothing to read there, several kinds, or settings that do not apply to it.
    """
    settings = Settings(lines, label_template, image_column, caption_column)
    files = matching(str(place))
    if files is None:
        files = _archives_in(pathlib.Path(place), follow_links)
    if files:
        if not repeats:
            raise UserError(
                f"data: --no_repeats does not apply to {place}, which is no folder of pictures; leave it out"
            )
        return list_archives(str(place), files, settings, skip_damaged=skip_damaged)
    given: dict[str, Any] = {
        "image_column": image_column,
        "caption_column": caption_column,
        "skip_damaged": skip_damaged,
    }
    if name := next((name for name, value in given.items() if value), ""):
        raise UserError(f"data: --{name} does not apply to {place}, a folder of pictures; leave it out")
    return list_folder(place, lines=lines, repeats=repeats, follow_links=follow_links, label_template=label_template)


def matching(place: str) -> list[epath.Path] | None:
    """The files that a place stands for, sorted: a file, a pattern (`*`, `**`, `?`, `[0-9]`, `{000..099}`), or all
    archives in a folder on a bucket and the two levels below it; None for a local folder.

    Raises:
        UserError: there are none.
    """
    path = epath.Path(place)
    if path.is_dir():
        if not is_remote(place):
            return None
        levels = [f"{place.rstrip('/')}/{'*/' * level}*" for level in range(_LEVELS)]
        files = [file for suffix in READERS.names for level in levels for file in _globbed(level + suffix)]
        if not files:
            raise UserError(
                f"data: {place} holds none of {' '.join(READERS.names)}, from which pictures on a bucket are read; "
                "copy a folder of pictures to this machine first"
            )
        return sorted(files, key=str)
    if path.exists():
        return [path]
    files = [file for pattern in _spelled(place) for file in _files(pattern)]
    if not files or files == [path]:
        raise UserError(
            f"data: {place} is not a folder, nor a file, nor a pattern of files that are there; see what is there "
            "with ls"
        )
    return sorted(set(files), key=str)


def _files(pattern: str) -> list[epath.Path]:
    if not glob.has_magic(pattern):
        return [epath.Path(pattern)]  # one of many: whether it is there is seen when it is opened
    return [file for file in _globbed(pattern) if is_remote(pattern) or file.is_file()]


def _spelled(place: str) -> Iterator[str]:
    """`a-{0..2}.tar` as the three names that it stands for."""
    match = _RANGE.search(place)
    if not match:
        yield place
        return
    first, last = int(match[1]), int(match[2])
    if not 0 <= last - first < _MOST_FILES:
        raise UserError(f"data: {match[0]} in {place} is no range of numbers; write it as {{000..099}}")
    for number in range(first, last + 1):
        yield from _spelled(place[: match.start()] + str(number).zfill(len(match[1])) + place[match.end() :])


def _globbed(pattern: str) -> list[epath.Path]:
    if not is_remote(pattern):
        return [epath.Path(name) for name in retried(lambda: glob.glob(pattern, recursive=True), pattern)]  # noqa: PTH207
    if "**" in pattern:
        raise UserError(f"data: {pattern}: ** would list the whole of a bucket; write a * for each level of folders")
    scheme, _, rest = pattern.partition("://")
    bucket, _, rest = rest.partition("/")
    return retried(lambda: list(epath.Path(f"{scheme}://{bucket}").glob(rest)), pattern)


def _archives_in(folder: pathlib.Path, follow_links: bool) -> list[epath.Path]:
    """The archives below a folder that holds no pictures.

    Raises:
        UserError: it holds both.
    """
    names = walk(folder, follow_links).files
    found = [name for name in names if is_archive(name) and not is_metadata(pathlib.PurePosixPath(name).name)]
    picture = next((name for name in names if pathlib.PurePosixPath(name).suffix.lower() in SUFFIXES), None)
    if found and picture is not None:
        raise UserError(
            f"data: {folder} holds pictures (such as {shown(picture)}) and archives (such as {shown(found[0])}); give "
            f"the archives alone, such as --images='{folder}/**/*{pathlib.PurePosixPath(found[0]).suffix}', or move "
            "them away"
        )
    return [epath.Path(names[name]) for name in sorted(found)]
