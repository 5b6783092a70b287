"""Digests of the small files of a run, which it reads again: a changed bit in a tokenizer is another training.

A folder's `digests.json` has the SHA-256 of every file below it but the weights, whose arrays have checksums of their
own; a JSON file of ours carries its own digest.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any

from etils import epath

from offsetjax.errors import UserError
from offsetjax.files import write_whole
from offsetjax.json_text import KEY, is_damaged, parse_object, signed
from offsetjax.storage.retry import retried

_log = logging.getLogger("offsetjax")
FILE = "digests.json"


def check_json(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A JSON object without its digest.

    Raises:
        UserError: the object is not the one that was written.
    """
    if is_damaged(values):
        raise UserError(f"{where} is damaged: its digest is not the one that was written; restore it from a copy")
    return {key: value for key, value in values.items() if key != KEY}


def write(folder: epath.PathLike) -> None:
    """Writes the digests of what lies in a folder."""
    folder = epath.Path(folder)
    found = {name: _of_file(folder / name) for name in _names(folder)}
    write_whole(folder / FILE, json.dumps(signed(found), indent=0) + "\n")


def check(folder: epath.PathLike) -> None:
    """Compares a folder with its digests; one without them, of a run begun before there were any, is reported.

    Raises:
        UserError: a file that is missing or has changed.
    """
    folder = epath.Path(folder)
    file = folder / FILE
    if not file.exists():
        _log.warning("%s is missing: what lies beside it is not checked", file)
        return
    try:
        stored = parse_object(retried(file.read_bytes, str(file)))
    except ValueError as error:
        raise UserError(f"workdir: {file} is damaged; restore it from a copy") from error
    for name, digest in check_json(stored, f"workdir: {file}").items():
        path = folder / name
        if not path.exists():
            raise UserError(f"workdir: {path} is missing; restore it from a copy")
        if retried(lambda path=path: _of_file(path), str(path)) != digest:  # type: ignore[misc]
            raise UserError(f"workdir: {path} is damaged: it has changed since it was written; restore it from a copy")


def _names(folder: epath.Path, prefix: str = "") -> list[str]:
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            found += _names(path, f"{prefix}{path.name}/")
        elif path.name != FILE and not (prefix and path.name.endswith(".safetensors")):
            found.append(prefix + path.name)
    return found


def _of_file(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:32]
