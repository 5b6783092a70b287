"""Where a command writes: looked at before its work, which may take hours; files are there whole, or not at all."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from offsetjax.errors import Status, StorageError, UserError, kind_of, one_line, storage_reason

_BUCKET = re.compile(r"gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](/.*)?", re.DOTALL)
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):(/*)(.*)", re.IGNORECASE | re.DOTALL)
_BUCKETS = ("gs", "gcs", "gsutil", "gcloud")
_REMOTE = ("s3", "s3a", "az", "azure", "abfs", "wasb", "hdfs", "http", "https", "ftp", "sftp", "ssh", "hf", "r2", "oss")


def misplaced(path: str) -> str:
    """What is wrong with a path that a user gives, and the remedy; "" where it is a local one or gs://BUCKET/….

    Nothing is looked up: a near miss would become a local folder of an odd name, and be lost with its machine.
    """
    if not path:
        return "it is empty; give a path"
    if not all(letter.isprintable() or letter == " " for letter in path):
        return "it has a letter that cannot be shown; give another name"
    if _BUCKET.fullmatch(path):
        return ""
    if path == "~" or path.startswith("~/"):
        return f"~ is the shell's, which has left it; write {Path(path).expanduser()}"
    if path.lower().startswith(("gs://", "gs//")):
        rest = path[4:].lstrip("/")
        if _BUCKET.fullmatch(f"gs://{rest}") and not path.startswith("gs:///"):
            return f"did you mean gs://{rest}?"
        bucket, slash, name = rest.partition("/")
        if _BUCKET.fullmatch(f"gs://{bucket.lower()}"):
            return f"a bucket's name has no capitals; did you mean gs://{bucket.lower()}{slash}{name}?"
        return f"it names no bucket; write gs://BUCKET/{rest}"
    if not (found := _SCHEME.fullmatch(path)):
        return ""
    scheme, slashes, rest = found[1].lower(), found[2], found[3]
    if scheme in _BUCKETS and (slashes or scheme == "gs"):
        return f"did you mean gs://{rest}?"
    if scheme == "file" and slashes:
        return f"a local path has no scheme; write /{rest.removeprefix('localhost/')}"
    if len(slashes) > 1 or (slashes and scheme in _REMOTE):
        return f"{scheme}:// is not read or written; give a local path, or gs://BUCKET/…"
    return ""


def check_place(name: str, path: str) -> str:
    """The path, if it is a local one or on gs://.

    Args:
        name: of the option, or the field, that gives it.

    Raises:
        UserError: it is neither.
    """
    if wrong := misplaced(path):
        raise UserError(f"{name} = {path!r}: {wrong}" if path else f"{name} is empty; give a path")
    return path


def unfinished(path: epath.PathLike) -> epath.Path:
    """The hidden name beside a file under which `write_whole` writes it."""
    path = epath.Path(path)
    return path.parent / f".{path.name}.unfinished"


def write_whole(path: epath.PathLike, content: bytes | str) -> None:
    """Writes a file under another name, and renames it: no reader, and no interruption, finds half of it.

    The folder is made where there is none. A bucket shows what is written once it is whole; a device is written to.

    Raises:
        OSError: the place cannot be written to; what was there before is unchanged.
        StorageError: it is full, read-only or over its quota.
    """
    write_all({path: content})


def write_all(contents: Mapping[Any, bytes | str]) -> None:
    """The same for several files, by their paths: all are written, or on a disk none.

    Raises:
        OSError, StorageError: as for `write_whole`; folders that were made for them are gone again.
    """
    written: list[tuple[epath.Path, Path]] = []  # under which name, and for which
    made: list[Path] = []
    try:
        for path, content in contents.items():
            data = content.encode() if isinstance(content, str) else content
            if is_remote(path):
                epath.Path(path).write_bytes(data)
                continue
            path = Path(path).resolve()
            made += [folder for folder in path.parents if not folder.exists() and folder not in made]
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not path.is_file():
                path.write_bytes(data)
                continue
            written.append((unfinished(path), path))
            with written[-1][0].open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # or a crash of the machine could leave the new name with nothing in it
        for temporary, path in written:
            temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(Exception):  # the first error is the one to report
            for temporary, _ in written:
                temporary.unlink(missing_ok=True)
            for folder in sorted(made, key=lambda folder: -len(folder.parts)):
                folder.rmdir()
        if isinstance(error, OSError) and kind_of(error) == Status.STORAGE:
            need = sum(len(content.encode() if isinstance(content, str) else content) for content in contents.values())
            what = "the file takes" if len(contents) == 1 else f"the {len(contents)} files take"
            raise storage_error(written[-1][1] if written else path, error, need, what) from error
        raise


@contextlib.contextmanager
def written_to(folder: epath.PathLike) -> Iterator[None]:
    """Inside, a folder is worked in: one that is taken away, or closed, is storage that a person has to see to."""
    try:
        yield
    except OSError as error:
        inside = error.filename is not None and os.fspath(error.filename).startswith(os.fspath(folder))
        is_gone = kind_of(error) == Status.MISTAKE and inside
        if is_gone or kind_of(error) == Status.STORAGE:
            raise storage_error(error.filename or folder, error) from error
        raise


def room_of(path: epath.PathLike) -> int | None:
    """The bytes that are free where a path lies or will lie; None on a bucket, or where that cannot be known."""
    if is_remote(path):
        return None
    there = Path(path).absolute()
    try:
        while not there.exists() and there != there.parent:
            there = there.parent
        return shutil.disk_usage(there).free
    except OSError:
        return None


def storage_error(path: epath.PathLike, error: BaseException, need: int = 0, what: str = "it takes") -> StorageError:
    """The error for a place that a person has to see to, with what was to be written and what room there is.

    Args:
        need: bytes; 0: it is not known.
        what: needs them, such as "the file takes".
    """
    room = room_of(path)
    needs = f"{what} {size_text(need)}" if need else ""
    free = f"{size_text(room)} are free" if room is not None else ""
    details = f" ({', '.join(filter(None, (needs, free)))})" if needs or free else ""
    why = storage_reason(error)
    if not is_remote(path) and not Path(path).absolute().parent.exists():
        why = "its folder is gone"
    return StorageError(f"{path}: {why}{details}; see to it, then the same command tries again")


def size_text(count: int) -> str:
    """`5_200_000 -> "5.2 MB"`."""
    unit = next((unit for unit in ("GB", "MB", "kB") if count >= {"GB": 1e9, "MB": 1e6, "kB": 1e3}[unit]), "bytes")
    return f"{count / {'GB': 1e9, 'MB': 1e6, 'kB': 1e3, 'bytes': 1}[unit]:.3g} {unit}"


def check_folder(command: str, folder: epath.PathLike) -> epath.Path:
    """The path of a folder that is there, or can be made.

    Raises:
        UserError: a file is in its place, or the place cannot be written to.
        StorageError: it lies on a disk that is read-only.
    """
    folder = epath.Path(folder)
    if is_remote(folder):
        _try(command, folder)
        return folder
    there = next((path for path in (folder, *folder.parents) if path.exists()), None)
    if there and not there.is_dir():
        raise UserError(f"{command}: {there} is a file, where --out needs a folder; give another --out")
    if there and not os.access(there, os.W_OK | os.X_OK):
        if os.statvfs(there).f_flag & os.ST_RDONLY:
            raise storage_error(folder, OSError(errno.EROFS, os.strerror(errno.EROFS)))
        raise UserError(f"{command}: {there} cannot be written to; give another --out")
    return folder


def _try(command: str, folder: epath.Path) -> None:
    """Raises a UserError where a bucket cannot be written to, which only writing shows."""
    probe = unfinished(folder / "probe")
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(f"{command}: {folder} cannot be written to ({one_line(error)}); give another --out") from error


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is of an object store, which has no folders and cannot append."""
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
