"""The diffusers directory: a folder for each part, with `config.json` and `diffusion_pytorch_model.safetensors`.

Weights may be several files, `<stem>-00001-of-00002.safetensors`, beside an index, `<stem>.safetensors.index.json`.
They may be there in variants: `<stem>.fp16.safetensors`, or `<stem>.safetensors.index.fp16.json`, in diffusers once
`<stem>.fp16.safetensors.index.json`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
from etils import epath

from offsetjax.errors import UserError, one_line
from offsetjax.formats.safetensors import PICKLES, NotFiniteError, open_tensors, read_metadata
from offsetjax.formats.shards import open_sharded, shard_files, write_sharded
from offsetjax.formats.tensors import Tensor
from offsetjax.json_text import parse_object

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")  # those with weights
_CONFIGS = {"scheduler": "scheduler/scheduler_config.json", "model_index": "model_index.json"}
_PLAIN = r"(\.[^.]+(?<!-of-\d{5}))?\.safetensors"  # and no shard, which has its index


def stem(part: str) -> str:
    """What the names of a part's files of weights begin with."""
    return "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"


@dataclass(frozen=True)
class Directory:
    """A directory to read from.

    Attributes:
        variant: of the weights, where there are several; a part that does not have it is read without.
        where: what errors begin with.
        parts: that it may have, those first whose header is that of the model.
    """

    path: epath.Path
    variant: str = ""
    where: str = "model.pretrained"
    parts: tuple[str, ...] = PARTS

    def has(self, part: str) -> bool:
        """Whether there is such a part, or (`model_index`) such a file."""
        return (self.path / ("model_index.json" if part == "model_index" else part)).exists()

    def read_config(self, part: str) -> dict[str, Any]:
        """The configuration of a part, or (`model_index`) of the pipeline.

        Raises:
            UserError: it is missing or no JSON.
        """
        file = self.path / _CONFIGS.get(part, f"{part}/config.json")
        if not file.exists():
            or_else = f", or add {part} to model.from_scratch" if part in self.parts else ""
            raise UserError(f"{self.where}: {file} is missing; give a whole diffusers directory{or_else}")
        try:
            return parse_object(file.read_bytes())
        except ValueError as error:
            raise UserError(f"{self.where}: {file} is no configuration ({one_line(error)}); fetch it again") from error

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Every tensor of a part, by its PyTorch name.

        Raises:
            UserError: files are missing, damaged, or there are several variants of which none was named.
        """
        file = self._file(part)
        return open_sharded(file, self.where) if file.suffix == ".json" else open_tensors([file], self.where)

    def metadata(self) -> dict[str, str]:
        """The metadata in the header of the denoiser's weights, or of the autoencoder's where that is all.

        Raises:
            UserError: files are missing or damaged.
        """
        part = next((part for part in self.parts if self.variants(part)), None)
        if part is None:
            return {}
        file = self._file(part)
        return read_metadata(shard_files(file, self.where)[0] if file.suffix == ".json" else file, self.where)

    def _file(self, part: str) -> epath.Path:
        """The file of a part's weights, or the index of several."""
        folder, found = self.path / part, self.variants(part)
        variant = next(iter(found), "") if len(found) == 1 else ""
        variant = self.variant if self.variant in found else variant
        if variant in found:
            return folder / found[variant]
        if found:
            raise UserError(
                f"{self.where}: {folder} has the variants {', '.join(sorted(found))}; name one in model.variant"
            )
        pickled = [p.name for p in folder.iterdir() if p.suffix in PICKLES] if folder.exists() else []
        if pickled:
            raise UserError(pickle_message(folder / pickled[0], self.where))
        raise UserError(f"{self.where}: {folder / stem(part)}.safetensors is missing; fetch the whole directory")

    def variants(self, part: str) -> dict[str, str]:
        """The variants of a part's weights, "" the plain one, each with its file or its index of files."""
        folder = self.path / part
        names = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
        found: dict[str, str] = {}
        for pattern in (r"(\.[^.]+)?\.safetensors\.index\.json", r"\.safetensors\.index(\.[^.]+)?\.json", _PLAIN):
            for name in names:
                if match := re.fullmatch(re.escape(stem(part)) + pattern, name):
                    found[(match[1] or "").removeprefix(".")] = name  # a file goes before an index
        return found


def open_part(directory: epath.PathLike, part: str) -> dict[str, Tensor]:
    """The tensors of a part in a work directory.

    Raises:
        UserError: files are missing or damaged.
    """
    return Directory(epath.Path(directory), where="workdir").tensors(part)


def pickle_message(file: epath.Path, where: str) -> str:
    """Why a pickle is not read, and what to do."""
    load = f'from_single_file("{file}")' if file.suffix == ".ckpt" else 'from_pretrained("DIRECTORY")'
    return (
        f"{where}: {file} is a pickle, which can run code: convert it to safetensors, in PyTorch: "
        f'StableDiffusionPipeline.{load}.save_pretrained("NEW", safe_serialization=True)'
    )


def write_part(
    directory: epath.PathLike,
    part: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    dtype: str | None = None,
    metadata: Mapping[str, str] | None = None,
    has_checksums: bool = True,
    max_shard_bytes: int = 10 * 10**9,
) -> None:
    """Writes one part's configuration and weights.

    Args:
        dtype: of the weights in the files; None: each keeps its own.
        metadata: goes into the header of the safetensors files.
        has_checksums: as for `write_tensors`.
        max_shard_bytes: above which the weights are several files with an index.

    Raises:
        NotFiniteError: the name of a tensor with values that are not finite in the file's dtype.
    """
    folder = epath.Path(directory) / part
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
    header = {"format": "pt", **(metadata or {})}
    try:
        write_sharded(
            folder,
            stem(part),
            tensors,
            dtype=dtype,
            metadata=header,
            has_checksums=has_checksums,
            max_shard_bytes=max_shard_bytes,
        )
    except NotFiniteError as error:
        raise NotFiniteError(f"{part}: {error}") from error


def scheduler_config(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """`scheduler_config.json` of a scheduler as a process gives it: its class and its settings."""
    return {"_class_name": scheduler["_class_name"], "_diffusers_version": diffusers.__version__, **scheduler}


def write_scheduler(directory: epath.PathLike, config: Mapping[str, Any]) -> None:
    """Writes the scheduler's configuration, and with it what a PyTorch pipeline samples by."""
    folder = epath.Path(directory) / "scheduler"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scheduler_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_index(directory: epath.PathLike, pipeline: str, scheduler: str, entries: Mapping[str, Any]) -> None:
    """Writes `model_index.json`: which class loads which folder.

    Args:
        pipeline, scheduler: their classes.
        entries: the others, [library, class] by folder, and the pipeline's own settings.
    """
    index = {
        "_class_name": pipeline,
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", scheduler],
        **entries,
    }
    (epath.Path(directory) / "model_index.json").write_text(json.dumps(dict(sorted(index.items())), indent=2) + "\n")
