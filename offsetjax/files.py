"""Where a command writes: looked at before its work, which may take hours; files are there whole, or not at all."""

import contextlib
import os

from etils import epath

from offsetjax.errors import UserError


def unfinished(path: epath.PathLike) -> epath.Path:
    """The hidden name beside a file under which `write_whole` writes it."""
    path = epath.Path(path)
    return path.parent / f".{path.name}.unfinished"


def write_whole(path: epath.PathLike, content: bytes | str) -> None:
    """Writes a file under another name, and renames it: no reader, and no interruption, finds half of it.

    The folder is made where there is none.

    Raises:
        OSError: the place cannot be written to; what was there before is unchanged.
    """
    path, temporary = epath.Path(path), unfinished(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to tell
            temporary.unlink(missing_ok=True)
        raise


def check_folder(command: str, folder: epath.PathLike) -> epath.Path:
    """The path of a folder that is there, or can be made.

    Raises:
        UserError: a file is in its place, or the place cannot be written to.
    """
    folder = epath.Path(folder)
    there = next((path for path in (folder, *folder.parents) if path.exists()), None)
    if there and not there.is_dir():
        raise UserError(f"{command}: {there} is a file, where --out needs a folder; give another --out")
    is_local = "://" not in os.fspath(folder)  # of a bucket nothing tells it but to write
    if there and is_local and not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{command}: {there} cannot be written to; give another --out")
    return folder


def check_file(command: str, file: epath.PathLike) -> epath.Path:
    """The path of a file that can be written, or written anew.

    Raises:
        UserError: a folder is in its place, or the place cannot be written to.
    """
    file = epath.Path(file)
    if file.is_dir():
        raise UserError(f"{command}: {file} is a folder, where --out needs a file; give another --out")
    check_folder(command, file.parent)
    return file
