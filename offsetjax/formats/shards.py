"""Weights in several files beside an index, `<stem>.safetensors.index.json`, that says which tensor is in which."""

import json
import re
from collections.abc import Mapping

from etils import epath

from offsetjax.errors import UserError
from offsetjax.formats.safetensors import converted, open_tensors, write_tensors
from offsetjax.formats.tensors import Tensor
from offsetjax.json_text import parse_object


def open_sharded(index: epath.PathLike, where: str) -> dict[str, Tensor]:
    """The tensors of the files that an index names.

    Raises:
        UserError: it is no such index, it names files elsewhere, or one of them is missing, damaged or another's.
    """
    tensors = open_tensors(shard_files(index, where), where)
    for name, file in _weight_map(epath.Path(index), where).items():
        if name not in tensors:
            raise UserError(
                f"{where}: {epath.Path(index).parent / file} is damaged ({_shown(name)} is missing); fetch it again"
            )
    return tensors


def shard_files(index: epath.PathLike, where: str) -> list[epath.Path]:
    """The files that an index names, which all are there.

    Raises:
        UserError: it is no such index, it names files elsewhere, or one of them is missing.
    """
    index = epath.Path(index)
    files = [index.parent / name for name in sorted(set(_weight_map(index, where).values()))]
    for file in files:
        if not file.exists():
            raise UserError(f"{where}: {file} is missing, which {index.name} names; fetch it")
    return files


def _weight_map(index: epath.Path, where: str) -> dict[str, str]:
    try:
        weight_map = dict(parse_object(index.read_bytes())["weight_map"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{where}: {index} is no index of safetensors files ({_shown(repr(error))}); fetch it again"
        ) from error
    for name in weight_map.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name) or ".." in name:
            raise UserError(f"{where}: {index} names {repr(name)[:200]}, which is no file beside it; fetch it again")
    if not weight_map:
        raise UserError(f"{where}: {index} names no files; fetch it again")
    return weight_map


def _shown(name: str) -> str:
    return name if name.isprintable() and len(name) < 200 else repr(name)[:200]


def write_sharded(
    folder: epath.PathLike,
    stem: str,
    tensors: Mapping[str, Tensor],
    *,
    dtype: str | None = None,
    metadata: Mapping[str, str] | None = None,
    has_checksums: bool = True,
    max_shard_bytes: int = 10 * 10**9,
) -> None:
    """Writes `<stem>.safetensors`, or several files with an index, as diffusers and transformers do.

    Args:
        dtype, metadata, has_checksums: as for `write_tensors`.
        max_shard_bytes: the most bytes of tensors in one file; a larger tensor has a file of its own.
    """
    folder, sizes = epath.Path(folder), converted(tensors, dtype)
    files: list[dict[str, Tensor]] = [{}]
    room = max_shard_bytes
    for name, tensor in sizes.items():
        if tensor.nbytes > room and files[-1]:
            files.append({})
            room = max_shard_bytes
        files[-1][name] = tensors[name]
        room -= tensor.nbytes
    if len(files) == 1:
        write_tensors(
            folder / f"{stem}.safetensors", tensors, dtype=dtype, metadata=metadata, has_checksums=has_checksums
        )
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(files, 1):
        file = f"{stem}-{number:05}-of-{len(files):05}.safetensors"
        write_tensors(folder / file, shard, dtype=dtype, metadata=metadata, has_checksums=has_checksums)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
