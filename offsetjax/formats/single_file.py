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

from offsetjax.diffusion.variance_preserving import single_file_markers
from offsetjax.errors import UserError
from offsetjax.formats import original_configs as inferred
from offsetjax.formats.diffusers import PARTS
from offsetjax.formats.original_configs import TEXT_PREFIXES, is_open_clip
from offsetjax.formats.original_names import (
    LOGIT_SCALE,
    UNET,
    Rule,
    clip_rules,
    open_clip_rules,
    unet_rules,
    unused_open_clip,
    vae_rules,
)
from offsetjax.formats.safetensors import open_file, write_tensors
from offsetjax.formats.tensors import Tensor, of_array, transposed

WHERE = "model.pretrained"  # what an error begins with
SUPPORTED = "Stable Diffusion 1.x, 2.x and XL base"
FAMILIES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "Stable Diffusion XL"}

# What training leaves in a checkpoint: tables of the schedule, averaged weights, losses.
_LEFT_OVER = re.compile(
    r"(model\.)?(betas|alphas_\w+|sqrt_\w+|log_one_minus\w+|posterior_\w+|lvlb_weights|logvar)"
    r"|model_ema\..*|first_stage_model\.(loss|model_ema)\..*|denoiser\.(log_)?sigmas|scale_factor|global_step"
)
# What can be computed, what marks the kind of a model, and the projection of CLIP's first encoder, for which no model
# has a use.
_KNOWN = re.compile(
    r".*\.embeddings\.position_ids|cond_stage_model\.model\.attn_mask|conditioner\.embedders\.1\.model\.attn_mask"
    r"|(cond_stage_model|conditioner\.embedders\.0)\.(logit_scale|(transformer\.)?text_projection(\.weight)?)"
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
        ignored: the names of what training left in the file.
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
            raise UserError(
                f"{WHERE}: {self.path} holds no {part}; give a whole model, or add it to model.from_scratch"
            )
        return dict(self.configs[part])

    def tensors(self, part: str) -> dict[str, Tensor]:
        """A part's tensors by diffusers' names.

        Raises:
            UserError: the family has no such part.
        """
        self.read_config(part)
        return self.parts[part]


def open_single_file(path: epath.PathLike) -> SingleFile:
    """Recognises a model by the names and shapes in its file's header.

    Raises:
        UserError: the file is damaged, of another family, or tensors are missing, extra or misshapen, by name.
    """
    path = epath.Path(path)
    tensors, header = open_file(path, WHERE)
    try:
        tensors = _modern(tensors)
        family = _family(tensors)
        configs = inferred.configs_of(tensors, header, family)
        parts = to_diffusers(tensors, configs, family)
    except ValueError as error:
        raise UserError(f"{WHERE}: {path} {error}") from error
    except (KeyError, IndexError, StopIteration) as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else "its tensors have unknown shapes"
        raise UserError(f"{WHERE}: {path}: {what}; is it a whole model of {SUPPORTED}?") from error
    carried = {name: tensors[name] for name in _unused(configs, family) if name in tensors}
    ignored = tuple(sorted(name for name in tensors if _LEFT_OVER.fullmatch(name)))
    return SingleFile(path, family, configs, parts, carried, ignored, header)


def write_single_file(
    path: epath.PathLike,
    parts: Mapping[str, Mapping[str, Tensor]],
    configs: Mapping[str, Mapping[str, Any]],
    family: str,
    carried: Mapping[str, Tensor] | None = None,
    *,
    dtype: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a model in the original layout, one tensor after the other.

    Args:
        parts, configs, family, carried: as for `to_original`.
        dtype: of the weights in the file; None: each keeps its own.
        metadata: goes into the header.

    Raises:
        UserError: read back, the file would be a model of another architecture or schedule, for it says neither.
    """
    header = {"format": "pt", **(metadata or {})}
    tensors = to_original(parts, configs, family, carried)
    inferred.check_said(tensors, header, configs, family)
    write_tensors(path, tensors, dtype=dtype, metadata=header)


def to_diffusers(
    tensors: Mapping[str, Tensor], configs: Mapping[str, Mapping[str, Any]], family: str
) -> dict[str, dict[str, Tensor]]:
    """The tensors of the original layout by part and diffusers' name.

    Args:
        configs: of the parts, in diffusers' names.

    Raises:
        ValueError: names that are missing or are no part of such a model, or shapes that cannot be.
    """
    rules = {part: list(_rules(part, config, family)) for part, config in configs.items() if part in PARTS}
    known = {rule.original for part in rules.values() for rule in part} | _unused(configs, family).keys()
    problems = [f"{name} is not part of the model" for name in tensors.keys() - known if not _is_ignored(name)]
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in rules}
    for part, rule in ((part, rule) for part, part_rules in rules.items() for rule in part_rules):
        if rule.original not in tensors:
            problems.append(f"{rule.original} is missing")
            continue
        try:
            parts[part] |= rule.to_diffusers(tensors[rule.original])
        except ValueError as error:
            problems.append(f"{rule.original}: {error}")
    if problems:
        problems.sort()
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"as a model of {FAMILIES[family]}: {'; '.join(problems[:4])}{more}; is it a whole model?")
    return parts


def to_original(
    parts: Mapping[str, Mapping[str, Tensor]],
    configs: Mapping[str, Mapping[str, Any]],
    family: str,
    carried: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The inverse of `to_diffusers`.

    Args:
        parts: tensors by part and diffusers' name.
        configs: of these parts, in diffusers' names; with that of the `scheduler`, an SDXL model that predicts v is
            marked as one, for loaders that go by that.
        carried: what an imported file had and no part holds (`SingleFile.carried`); made up where it is not given.

    Raises:
        UserError: the layout cannot hold such an architecture.
    """
    if "vae" in parts and not configs["vae"].get("mid_block_add_attention", True):
        raise UserError(
            "export: the original layout has no autoencoder without attention, as this one is; export a diffusers "
            "directory"
        )
    found: dict[str, Tensor] = {}
    for part, tensors in parts.items():
        found |= {rule.original: rule.to_original(tensors) for rule in _rules(part, configs[part], family)}
    text = {part: configs[part] for part in TEXT_PREFIXES[family] if part in parts}
    for name, array in _unused(text, family).items():
        embedding = parts[list(text)[-1]]["text_model.embeddings.token_embedding.weight"]
        found[name] = of_array(array.astype(embedding.dtype))
    found |= carried or {}
    for part, config in text.items():
        if not is_open_clip(part, family):
            positions = np.arange(config["max_position_embeddings"], dtype=np.int64)[None]
            found[f"{TEXT_PREFIXES[family][part]}text_model.embeddings.position_ids"] = of_array(positions)
    if family == "sdxl":
        markers = single_file_markers(configs.get("scheduler", {}))
        found |= {name: of_array(np.zeros(0, np.float32)) for name in markers}
    return found


def _rules(part: str, config: Mapping[str, Any], family: str) -> Iterator[Rule]:
    if part == "unet":
        return unet_rules(config)
    if part == "vae":
        return vae_rules(config)
    prefix = TEXT_PREFIXES[family][part]
    if is_open_clip(part, family):
        return open_clip_rules(config, prefix, has_projection=part == "text_encoder_2")
    return clip_rules(config, prefix)


def _unused(configs: Mapping[str, Mapping[str, Any]], family: str) -> dict[str, np.ndarray]:
    """What the original has beyond the parts, with the values to write where no file gave others."""
    if family == "sd2" and "text_encoder" in configs:
        return unused_open_clip(configs["text_encoder"], TEXT_PREFIXES["sd2"]["text_encoder"])
    if family == "sdxl" and "text_encoder_2" in configs:
        return {f"{TEXT_PREFIXES['sdxl']['text_encoder_2']}logit_scale": LOGIT_SCALE}
    return {}


def _is_ignored(name: str) -> bool:
    return bool(_LEFT_OVER.fullmatch(name) or _KNOWN.fullmatch(name))


def _modern(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names that this module knows, whatever wrote the file.

    - `text_model`, which transformers had not at first, nor has from 5.6 on;
    - sgm's beginnings for the text encoder of 1.x and 2.x, which have no label where XL and its refiner have one;
    - the projection as a linear layer has it, `.weight` and not transposed.

    Raises:
        ValueError: a tensor is there by two names.
    """
    is_labelled = f"{UNET}label_emb.0.0.weight" in tensors
    found = {}
    for name, tensor in tensors.items():
        if not is_labelled:
            name = re.sub(r"^conditioner\.embedders\.0\.(?=model\.|transformer\.)", "cond_stage_model.", name)
        name = re.sub(r"^((?:\w+\.)+transformer\.)(?=embeddings|encoder|final_layer_norm)", r"\1text_model.", name)
        if re.search(r"\.model\.text_projection\.weight$", name) and len(tensor.shape) == 2:
            name, tensor = name.removesuffix(".weight"), transposed(tensor, (1, 0))
        if name in found:
            raise ValueError(f"has {name} by another name too; which of them counts?")
        found[name] = tensor
    return found


def _family(tensors: Mapping[str, Tensor]) -> str:
    """The family, by names and shapes.

    Raises:
        ValueError: none that is supported, or no model.
    """

    def some(pattern: str) -> bool:
        return any(map(re.compile(pattern).match, tensors))

    if some(r"lora_|.*\.lora_(down|up|A|B)\b|.*\.hada_w"):
        raise ValueError("is a LoRA, not a model; give it as lora.pretrained, and its base as model.pretrained")
    if some(r"down_blocks\.|text_model\.|encoder\.down_blocks\."):
        raise ValueError("is one part of a diffusers directory; give the directory")
    if f"{UNET}input_blocks.0.0.weight" not in tensors or some("edm_"):
        raise ValueError(f"is not one of the supported families ({SUPPORTED}) in the original layout")
    is_labelled = f"{UNET}label_emb.0.0.weight" in tensors
    is_xl = is_labelled and not some(r"cond_stage_model\.")
    if some(r"conditioner\.embedders\.0\.model\."):
        raise ValueError(f"is the refiner of SDXL, which is not one of the supported families ({SUPPORTED})")
    if is_labelled != is_xl:
        raise ValueError(f"has a denoiser with labels (unCLIP, upscaling), which none of {SUPPORTED} has")
    inputs, outputs = tensors[f"{UNET}input_blocks.0.0.weight"].shape[1], tensors[f"{UNET}out.2.weight"].shape[0]
    if inputs != outputs:
        raise ValueError(
            f"has a denoiser of {inputs} input channels, for inpainting or the like, which is not supported; use the "
            "model that makes pictures of text alone"
        )
    if is_xl:
        return "sdxl"
    return "sd2" if len(tensors[f"{UNET}middle_block.1.proj_in.weight"].shape) == 2 else "sd1"
