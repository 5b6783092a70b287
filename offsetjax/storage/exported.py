"""`offsetjax checkpoint verify FILE_OR_DIRECTORY`: whether an exported model's weights are those that were written."""

from etils import epath

from offsetjax import log
from offsetjax.errors import UserError
from offsetjax.files import check_place
from offsetjax.formats.safetensors import verify_file
from offsetjax.formats.shards import shard_files
from offsetjax.storage.retry import retried

_WHERE = "checkpoint"


def verify_export(path: str) -> None:
    """Reads every tensor of a safetensors file, or of all below a directory, and prints whether it has changed.

    Raises:
        UserError: one has, or has no checksum to compare it with.
    """
    top = epath.Path(check_place("FILE_OR_DIRECTORY", path))
    damaged, unknown = 0, 0
    for file in _files(top):
        name = file.name if file == top else str(file)[len(str(top)) + 1 :]
        try:
            count = retried(lambda file=file: verify_file(file, _WHERE), str(file))  # type: ignore[misc]
        except UserError as error:
            damaged += 1
            log.show(f"{name}  {str(error).removeprefix(f'{_WHERE}: ')}")
            continue
        unknown += count is None
        log.show(f"{name}  {'not compared: it has no checksums' if count is None else f'good: {count} tensors'}")
    if damaged:
        raise UserError(f"{_WHERE}: damaged files of {top}: {damaged}; export it again or restore it from a copy")
    if unknown:
        raise UserError(
            f"{_WHERE}: files of {top} without checksums: {unknown}; another program wrote them, or an earlier export: "
            "export it again, or compare it with its source"
        )


def _files(top: epath.Path) -> list[epath.Path]:
    if not top.exists():
        raise UserError(f"{_WHERE}: {top} is missing; give an exported file or directory, or a --workdir")
    if not top.is_dir():
        return [top]
    if (top / "checkpoints").exists() and (top / "config.json").exists():
        raise UserError(f"{_WHERE}: {top} is the work directory of a training; give it as --workdir={top}")
    files = _below(top)
    if not files:
        raise UserError(f"{_WHERE}: {top} has no .safetensors file; give an exported file or directory")
    return files


def _below(folder: epath.Path) -> list[epath.Path]:
    """The safetensors files below a folder, once those that indexes name are known to be there."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):  # what an export that was killed has left
            continue
        if path.is_dir():
            found += _below(path)
        elif path.name.endswith(".safetensors"):
            found.append(path)
        elif path.name.endswith(".safetensors.index.json"):
            shard_files(path, _WHERE)
    return found
