"""Files that are there whole, or not at all."""

import contextlib

from etils import epath


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
