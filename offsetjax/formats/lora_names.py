"""What a layer is called in LoRA files: by diffusers, by kohya's scripts, and by diffusers until 2023.

    diffusers  unet.mid_block.attentions.0.proj_in
    kohya      lora_unet_mid_block_attentions_0_proj_in, of SDXL lora_unet_middle_block_1_proj_in
    until 2023 unet.mid_block.….attn1.processor.to_out, for attn1.to_out.0; without `unet.` where it was saved alone

A text encoder's layers have `text_model.` in their names, but not where transformers 5.6 or a later one loaded it.

No rule can decide whether an underscore of kohya's was a dot or itself ("to_out_0"). So each key is looked up among
those that the model's own layers would have.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from flax.traverse_util import flatten_dict
from jaxtyping import PyTree

from offsetjax.formats.names import TEXT_MODULE, torch_name

_OLD_ENDS = {"to_out.0": "to_out", "q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}

# The original code's names in its UNet: of what stands alone, and inside a residual block.
_ORIGINAL = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_ORIGINAL_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(down|mid|up)_block(?:s\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")

Path = tuple[str, ...]
Renamed = Callable[[Collection[str]], dict[str, str]]  # of all layers of a part, by diffusers' names


@dataclass(frozen=True)
class Kohya:
    """What a family is to kohya's scripts.

    Attributes:
        prefixes: by part, what the names of its layers begin with; none of a family that the scripts do not know.
        original: by part, the original code's names of its layers, which a file may have too.
        writes_original: whether it is these that the scripts write.
        base_version: what they call the family in a file's header; empty: as it is called here.
        is_v2: whether they call it a Stable Diffusion 2.
    """

    prefixes: Mapping[str, str] = field(default_factory=dict)
    original: Mapping[str, Renamed] = field(default_factory=dict)
    writes_original: bool = False
    base_version: str = ""
    is_v2: bool = False


def layers(params: PyTree, leaf: str = "kernel") -> dict[str, Path]:
    """The PyTorch names, and the paths, of the linear and convolutional layers; with `down`, of a tree of adapters."""
    paths = [path[:-1] for path in flatten_dict(params) if path[-1] == leaf]
    return {torch_name((*path, "kernel")).removesuffix(".weight"): path for path in paths}


def kohya_names(part: str, names: Collection[str], kohya: Kohya) -> dict[str, str]:
    """Kohya's name for each layer of a part; `names` are all that it has. None of a part that kohya does not know."""
    if part not in kohya.prefixes:
        return {}
    is_original = kohya.writes_original and part in kohya.original
    written = kohya.original[part](names) if is_original else {name: name for name in names}
    return {name: _underscored(kohya.prefixes[part], other) for name, other in written.items()}


def known_names(part: str, names: Collection[str], kohya: Kohya) -> dict[str, str]:
    """Every name that a file may have for a layer of a part → the layer; a `.processor` in old ones is left out."""
    known = {f"{part}.{name}": name for name in names}
    if part in kohya.original:
        prefix, others = kohya.prefixes[part], kohya.original[part](names)
        known |= {name: name for name in names}  # saved alone
        known |= {_underscored(prefix, name): name for name in names}
        known |= {_underscored(prefix, other): name for name, other in others.items()}
    known |= {other: name for name, other in kohya_names(part, names, kohya).items()}
    for module in (f"{TEXT_MODULE}.", f"{TEXT_MODULE}_"):
        known |= {name.replace(module, ""): layer for name, layer in known.items() if module in name}
    for end, old_end in _OLD_ENDS.items():
        known |= {name.removesuffix(end) + old_end: layer for name, layer in known.items() if name.endswith(f".{end}")}
    return known


def original_names(names: Collection[str]) -> dict[str, str]:
    """The original code's name for each layer of a denoiser; `names` are all that it has."""
    places = {name: match.groups() for name in names if (match := _BLOCK.match(name))}
    # The original numbers one list of blocks: a residual block with its attention is one, so is a change of size.
    stride = 2 + max(int(place[3]) for place in places.values() if place[:3] == ("down", "0", "resnets"))
    attending = {place[:2] for place in places.values() if place[2] == "attentions"}

    def original(name: str) -> str:
        if name in _ORIGINAL:
            return _ORIGINAL[name]
        side, block, kind, place, rest = places[name]
        rest = _ORIGINAL_RESNET.get(rest, rest)
        first, within = int(block or 0) * stride, int(kind == "attentions")
        if side == "mid":
            return f"middle_block.{2 * int(place) + within}.{rest}"
        if kind == "downsamplers":
            return f"input_blocks.{first + stride}.0.op"
        if kind == "upsamplers":
            return f"output_blocks.{first + stride - 1}.{1 + ((side, block) in attending)}.conv"
        if side == "down":
            return f"input_blocks.{first + 1 + int(place)}.{within}.{rest}"
        return f"output_blocks.{first + int(place)}.{within}.{rest}"

    return {name: original(name) for name in names}


def _underscored(prefix: str, name: str) -> str:
    return prefix + name.replace(".", "_")
