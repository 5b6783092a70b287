"""A whole model in one safetensors file, in Stable Diffusion's original layout (LDM, sgm), read and written.

    model.diffusion_model.*                                    the denoiser
    first_stage_model.*                                        the autoencoder
    cond_stage_model.transformer.* | cond_stage_model.model.*  the text encoder of 1.x (CLIP) | of 2.x (OpenCLIP)
    conditioner.embedders.0.transformer.* and .1.model.*       those of XL
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from offsetjax.errors import UserError
from offsetjax.formats import original_configs as configs
from offsetjax.formats.original_configs import TEXT_PREFIXES
from offsetjax.formats.original_names import (
    UNET,
    VAE,
    Rule,
    clip_rules,
    logit_scale,
    open_clip_rules,
    unet_rules,
    unused_open_clip,
    vae_rules,
)
from offsetjax.formats.tensors import Tensor, of_array, open_file

SUPPORTED = "Stable Diffusion 1.x, 2.x and XL base"

# What training leaves in a checkpoint, and what can be computed: tables of the schedule, averaged weights, masks, the
# positions' numbers, and the projection of CLIP that no model uses.
_IGNORED = re.compile(
    r"(?:model\.)?(?:betas|alphas_cumprod(?:_prev)?|sqrt_\w+|log_one_minus\w+|posterior_\w+|lvlb_weights|logvar)"
    r"|model_ema\..*|denoiser\.(?:log_)?sigmas|scale_factor|global_step"
    r"|first_stage_model\.(?:loss|model_ema)\..*"
    r"|cond_stage_model\.model\.attn_mask|conditioner\.embedders\.1\.model\.attn_mask"
    r"|.*\.text_model\.embeddings\.position_ids"
    r"|(?:cond_stage_model|conditioner\.embedders\.0)\.(?:logit_scale|(?:transformer\.)?text_projection(?:\.weight)?)"
    r"|v_pred|ztsnr"
)


@dataclass(frozen=True)
class SingleFile:
    """A file to read from, with what follows of its header.

    Attributes:
        family: sd1, sd2 or sdxl.
        configs: of each part and of the scheduler, in diffusers' names; `model_index` too.
        parts: the tensors by part and diffusers' name.
        carried: those that no part holds, by original name.
        ignored: the names of what is no part of a model.
        header: the metadata.
    """

    path: epath.Path
    family: str
    configs: Mapping[str, dict[str, Any]]
    parts: Mapping[str, dict[str, Tensor]]
    carried: Mapping[str, Tensor]
    ignored: tuple[str, ...]
    header: Mapping[str, str]

    def has(self, part: str) -> bool:
        """Whether it holds a part."""
        return part in self.configs

    def read_config(self, part: str) -> dict[str, Any]:
        """What follows for a part from the shapes and from the family.

        Raises:
            UserError: the family has no such part.
        """
        if part not in self.configs:
            raise UserError(f"model.pretrained: {self.path} has no {part}; it is a model of the family {self.family}")
        return self.configs[part]

    def tensors(self, part: str) -> dict[str, Tensor]:
        """A part's tensors by diffusers' names.

        Raises:
            UserError: the family has no such part.
        """
        self.read_config(part)
        return self.parts[part]


def open_single_file(path: epath.PathLike, where: str) -> SingleFile:
    """Recognises a model by the names and shapes in its file's header.

    Args:
        where: what an error begins with.

    Raises:
        UserError: the file is damaged, of another family, or tensors are missing, extra or misshapen, by name.
    """
    path = epath.Path(path)
    tensors, header = open_file(path, where)
    tensors = {_modern(name): tensor for name, tensor in tensors.items()}
    try:
        family = _family(tensors)
        inferred = _configs(tensors, header, family)
        parts = to_diffusers(tensors, inferred, family)
    except ValueError as error:
        raise UserError(f"{where}: {path} {error}") from error
    except (KeyError, IndexError, StopIteration) as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else "its tensors have unknown shapes"
        raise UserError(f"{where}: {path}: {what}; is it a whole model of {SUPPORTED}?") from error
    carried = {name: tensors[name] for name in _unused(inferred, family) if name in tensors}
    ignored = tuple(sorted(name for name in tensors if _IGNORED.fullmatch(name)))
    return SingleFile(path, family, inferred, parts, carried, ignored, header)
