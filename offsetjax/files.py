"""Where a command writes: looked at before its work, which may take hours; files are there whole, or not at all."""

import contextlib
import os
from pathlib import Path

from etils import epath

from offsetjax.errors import UserError, one_line


def unfinished(path: epath.PathLike) -> epath.Path:
    """The hidden name beside a file under which `write_whole` writes it."""
    path = epath.Path(path)
    return path.parent / f".{path.name}.unfinished"


def write_whole(path: epath.PathLike, content: bytes | str) -> None:
    """Writes a file under another name, and renames it: no reader, and no interruption, finds half of it.

    The folder is made where there is none. A bucket shows what is written once it is whole; a device is written to.

    Raises:
        OSError: the place cannot be written to; what was there before is unchanged.
    """
    content = content.encode() if isinstance(content, str) else content
    if _is_remote(path):
        epath.Path(path).write_bytes(content)
        return
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    temporary = unfinished(path)
    try:
        temporary.write_bytes(content)
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
    if _is_remote(folder):
        _try(command, folder)
        return folder
    there = next((path for path in (folder, *folder.parents) if path.exists()), None)
    if there and not there.is_dir():
        raise UserError(f"{command}: {there} is a file, where --out needs a folder; give another --out")
    if there and not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{command}: {there} cannot be written to; give another --out")
    return folder


def _try(command: str, folder: epath.Path) -> None:
    """Raises a UserError where a bucket cannot be written to, which nothing tells but to write."""
    probe = unfinished(folder / "probe")
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(f"{command}: {folder} cannot be written to ({one_line(error)}); give another --out") from error


def _is_remote(path: epath.PathLike) -> bool:
    return "://" in os.fspath(path)


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
