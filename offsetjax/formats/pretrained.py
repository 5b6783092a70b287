"""A pretrained model to begin from: a diffusers directory, or one file in the original layout."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from etils import epath

from offsetjax.errors import UserError, one_line
from offsetjax.formats.diffusers import PARTS, Directory, pickle_message
from offsetjax.formats.safetensors import PICKLES
from offsetjax.formats.single_file import SUPPORTED, WHERE, SingleFile, open_single_file
from offsetjax.formats.tensors import Tensor

_PIPELINES = re.compile(r"(Flax)?StableDiffusion(XL)?(Img2Img|ControlNet)?Pipeline")


@dataclass(frozen=True)
class Pretrained:
    """What `open_pretrained` gives.

    Attributes:
        family: sd1, sd2, sdxl, or empty where a directory holds too little to say.
        layout: diffusers or single_file.
    """

    path: epath.Path
    family: str
    layout: str
    source: Directory | SingleFile

    def has(self, part: str) -> bool:
        """Whether it holds a part, or (`model_index`) says how the parts work together."""
        return self.source.has(part)

    def read_config(self, part: str) -> dict[str, Any]:
        """The part's configuration with diffusers' names and values; of a single file, inferred.

        Args:
            part: or `scheduler`, or `model_index`.

        Raises:
            UserError: there is none, or it is no JSON.
        """
        return self.source.read_config(part)

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The part's tensors by PyTorch name; nothing is read yet.

        Raises:
            UserError: they are missing or damaged.
        """
        return self.source.tensors(part)

    def carried(self) -> dict[str, Tensor]:
        """Tensors of a single file that no part holds, by their original names, to be written with it again."""
        return dict(self.source.carried) if isinstance(self.source, SingleFile) else {}

    def ignored(self) -> tuple[str, ...]:
        """The names of what training left in a single file, averaged weights and the like, which is not read."""
        return self.source.ignored if isinstance(self.source, SingleFile) else ()

    def metadata(self) -> dict[str, str]:
        """What the header of the file says, or that of the denoiser's weights.

        Raises:
            UserError: the file is missing or damaged.
        """
        return dict(self.source.header) if isinstance(self.source, SingleFile) else self.source.metadata()


def open_pretrained(
    path: epath.PathLike,
    variant: str = "",
    others: Mapping[str, Callable[[Directory], bool]] | None = None,
    parts: tuple[str, ...] = PARTS,
) -> Pretrained:
    """Opens a diffusers directory, or a `.safetensors` file in the original layout.

    Args:
        variant: of a directory's weights, such as fp16; empty: the plain ones, or the only ones that there are.
        others: by family, whether a directory is of it; where it is of none, it is looked at as Stable Diffusion.
        parts: that a directory may have.

    Raises:
        UserError: it is missing, damaged, a pickle, or a model of a family that is not supported.
    """
    path = epath.Path(path)
    if path.is_dir():
        directory = Directory(path, variant, parts=parts)
        _check_variant(directory)
        found = [name for name, is_of in (others or {}).items() if is_of(directory)]
        return Pretrained(path, found[0] if found else _family(directory), "diffusers", directory)
    if path.suffix in PICKLES:
        raise UserError(pickle_message(path, WHERE))
    if path.suffix != ".safetensors":
        raise UserError(
            f"{WHERE}: {path} is neither a diffusers directory nor a .safetensors file; to fetch a model of the "
            "Hugging Face hub: hf download NAME --local-dir DIRECTORY"
        )
    if variant:
        raise UserError(f"model.variant: {variant!r} cannot apply to {path}, which is one file; leave it out")
    file = open_single_file(path)
    return Pretrained(path, file.family, "single_file", file)


def _check_variant(directory: Directory) -> None:
    variants = {variant for part in directory.parts for variant in directory.variants(part)}
    if directory.variant and directory.variant not in variants:
        there = ", ".join(sorted(variant or "the plain files" for variant in variants))
        raise UserError(
            f"model.variant: {directory.path} has no weights {directory.variant!r}; it has {there or 'none at all'}"
        )


def _family(directory: Directory) -> str:
    """The family of a diffusers directory, by its index and its configurations.

    Raises:
        UserError: none that is supported.
    """
    pipeline = directory.read_config("model_index").get("_class_name") if directory.has("model_index") else None
    if pipeline is not None and not _PIPELINES.fullmatch(str(pipeline)):
        kind = one_line(ValueError(pipeline), most=80)  # a stranger's file may have a list there, of any length
        raise UserError(
            f"{WHERE}: {directory.path} is a {kind}, which is not one of the supported families ({SUPPORTED})"
        )
    if not any(directory.has(part) for part in PARTS):
        raise UserError(f"{WHERE}: {directory.path} holds none of {', '.join(PARTS)}; is it a diffusers directory?")
    unet = directory.read_config("unet") if directory.has("unet") else {}
    if directory.has("text_encoder_2") or unet.get("addition_embed_type") == "text_time":
        is_half = pipeline == "StableDiffusionXLPipeline"  # the base model's, which lacks a folder
        if unet and not is_half and not directory.has("text_encoder") and directory.has("text_encoder_2"):
            raise UserError(
                f"{WHERE}: {directory.path} is the refiner of SDXL, which is not one of the supported families "
                f"({SUPPORTED})"
            )
        return "sdxl"
    if unet.get("in_channels", 4) != unet.get("out_channels", 4):
        raise UserError(
            f"{WHERE}: {directory.path} has a denoiser of {unet['in_channels']} input channels, for inpainting or the "
            f"like, which is not supported; use the model that makes pictures of text alone"
        )
    if unet:
        return "sd2" if unet.get("use_linear_projection") else "sd1"
    if directory.has("text_encoder"):
        return "sd2" if directory.read_config("text_encoder").get("hidden_act") == "gelu" else "sd1"
    return ""
