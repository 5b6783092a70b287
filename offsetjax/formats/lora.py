"""LoRA files, with the keys of diffusers (PEFT) or of kohya's scripts; older diffusers' keys are read too.

A layer's weight gains (α / rank) · up · down, in PyTorch's layout: down [rank, in, (h, w)], up [out, rank, (1, 1)].

    diffusers  unet.mid_block.attentions.0.proj_in.lora_A.weight (down) and .lora_B.weight (up), α in the header
    kohya      lora_unet_mid_block_attentions_0_proj_in.lora_down.weight, .lora_up.weight and .alpha
"""

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float, PyTree

from offsetjax.errors import UserError, one_line
from offsetjax.formats.lora_names import Kohya, Path, known_names, kohya_names, layers
from offsetjax.formats.names import from_torch, to_torch
from offsetjax.formats.safetensors import PICKLES, open_file, write_tensors
from offsetjax.formats.tensors import Tensor, cast, of_array, with_ndim
from offsetjax.json_text import parse_object

_PEFT_CONFIGS = "lora_adapter_metadata"  # diffusers' entry of the header, as JSON

_KERNEL = ("kernel",)  # both halves are laid out as the layer's kernel is

# PEFT's own files have the name of the adapter too, `lora_A.default.weight`, and the beginning `base_model.model`.
_ENDINGS = {
    "down": re.compile(r"(\.lora_A(\.\w+)?|\.lora_down|[._]lora\.down|\.lora_linear_layer\.down)\.weight$"),
    "up": re.compile(r"(\.lora_B(\.\w+)?|\.lora_up|[._]lora\.up|\.lora_linear_layer\.up)\.weight$"),
    "alpha": re.compile(r"\.alpha$"),
}
_OTHER_KINDS = {
    "DoRA": re.compile(r"\.dora_scale$|\.lora_magnitude_vector"),
    "LoHa": re.compile(r"\.hada_"),
    "LoKr": re.compile(r"\.lokr_"),
    "LoCon with a Tucker decomposition": re.compile(r"\.lora_mid\."),
    "OFT": re.compile(r"\.oft_"),
    "IA3": re.compile(r"\.on_input$|\.ia3_"),
    "GLoRA": re.compile(r"\.[ab][12]\.weight$"),
    "LyCORIS's full differences": re.compile(r"\.diff(_b)?$|\.[wb]_norm$"),
    "LoRA with biases": re.compile(r"\.lora_(A|B|down|up)(\.\w+)?\.bias$"),
}


@dataclass(frozen=True)
class LoadedLora:
    """Adapters of one rank and one scale, alpha / rank.

    Attributes:
        adapters: by part, float32, in the structure of `models.lora.init_adapters`.
        layers: by part, the PyTorch names of all layers that could be adapted.
    """

    adapters: dict[str, PyTree]
    rank: int
    alpha: float
    layers: Mapping[str, tuple[str, ...]]

    def targets(self, *parts: str) -> tuple[str, ...]:
        """The ends of names that choose, of all layers of these parts, those with adapters: the shortest there are.

        Raises:
            UserError: two text encoders have adapters in different layers, which no ends of names can choose.
        """
        adapted = {(part, name) for part in parts for name in layers(self.adapters[part], "down")}
        others = {(part, name) for part in parts for name in self.layers[part]} - adapted
        found = _shortest_ends({name for _, name in adapted}, {name for _, name in others})
        if found is None:
            raise UserError("lora.pretrained: it adapts different layers of the two text encoders; use another LoRA")
        return found


def _shortest_ends(chosen: Collection[str], others: Collection[str]) -> tuple[str, ...] | None:
    """The shortest ends that all chosen names have and no other has; None where there are none."""
    avoided = {end for name in others for end in _ends(name)}
    found = {next((end for end in _ends(name) if end not in avoided), "") for name in chosen}
    return None if "" in found else tuple(sorted(found))


def _ends(name: str) -> list[str]:
    """The ends of a name in whole components, the shortest first; none begins with a number, as the `0` of to_out.0."""
    components = name.split(".")
    ends = [".".join(components[-count:]) for count in range(1, len(components) + 1)]
    return [end for end in ends if not end[0].isdigit()]


def write_lora(
    file: epath.PathLike,
    adapters: Mapping[str, PyTree],
    *,
    base_like: Mapping[str, PyTree],
    family: str,
    kohya: Kohya,
    rank: int,
    alpha: float,
    keys: str = "kohya",
    dtype: str = "float32",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes the adapters of all parts into one file.

    Args:
        adapters: by part, trees of arrays.
        base_like: the parameters of these parts, or abstract ones: kohya's names for SDXL need all layers.
        family: its name.
        kohya: what the family is to kohya's scripts.
        keys: "kohya", which most programs read, or "diffusers".
        dtype: of the weights in the file.
        metadata: further entries of the header, which go before those written here.

    Raises:
        NotFiniteError: values are not finite in `dtype`.
    """
    tensors: dict[str, Tensor] = {}
    configs: dict[str, Any] = {}
    for part, tree in adapters.items():
        adapted, arrays = layers(tree, "down"), flatten_dict(tree)
        named = kohya_names(part, layers(base_like[part]), kohya) if keys == "kohya" else {}
        for name, path in adapted.items():
            down, up = (
                cast(of_array(to_torch(_KERNEL, np.asarray(arrays[*path, half]))), dtype) for half in ("down", "up")
            )
            if keys == "kohya":
                pair = {"lora_down.weight": down, "lora_up.weight": up, "alpha": of_array(np.float32(alpha))}
                tensors |= {f"{named[name]}.{end}": tensor for end, tensor in pair.items()}
            else:
                tensors |= {f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up}
        # Ends of names: the beginning of a text encoder's, `text_model`, transformers has in some versions alone.
        targets = _shortest_ends(adapted, layers(base_like[part]).keys() - adapted.keys())
        peft: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "target_modules": targets}
        peft |= {"rank_pattern": {}, "alpha_pattern": {}}
        configs |= {f"{part}.{key}": value for key, value in peft.items()}
    header = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
        "ss_base_model_version": kohya.base_version or family,
        "ss_v2": str(kohya.is_v2),
        **(metadata or {}),
    }
    if keys == "diffusers":  # which refuses a file that has it along with kohya's alphas
        header[_PEFT_CONFIGS] = json.dumps(configs, indent=2, sort_keys=True)
    write_tensors(file, tensors, metadata=header)


def read_lora(file: epath.PathLike, base_like: Mapping[str, PyTree], family: str, kohya: Kohya) -> LoadedLora:
    """Reads a LoRA of the parts of `base_like`, whatever its keys.

    The layers of a file may differ in rank and alpha. Here the rank is the highest of them, others being filled up with
    zeros, and the scale, alpha / rank, that of most layers: what others differ by is multiplied into `up`, in float32,
    which is exact for a power of two. Without an alpha, it is the rank.

    Args:
        base_like: by part, the parameters or abstract ones.
        family: its name.
        kohya: what the family is to kohya's scripts.

    Raises:
        UserError: the file is missing, damaged, a pickle or another kind of adapter, or it does not fit the model.
    """
    file = epath.Path(file)
    tensors, metadata = _open(file)
    if not kohya.prefixes and (key := next((key for key in tensors if key.startswith("lora_")), None)):
        raise UserError(
            f"lora.pretrained: {file} has {key}, but kohya's scripts have no names for layers of {family}; give a file "
            "with diffusers' names"
        )
    known = {key: layer for part, tree in base_like.items() for key, layer in _known(part, tree, kohya).items()}
    configs = _peft_configs(metadata, file)
    found, problems = _by_layer(tensors, known)
    adapters = {}
    for layer, given in found.items():
        try:
            adapters[layer] = _adapter(layer, given, configs)
        except ValueError as error:
            problems.append(f"{layer.part}.{layer.name} {error}")
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        what = "; ".join(problems[:4])
        raise UserError(f"lora.pretrained: {file}: {what}{more}; is it for another family than {family}?")
    rank, alpha, arrays = _alike(adapters)
    trees: dict[str, dict] = {}
    for layer, halves in arrays.items():
        trees.setdefault(layer.part, {}).update({(*layer.path, half): array for half, array in halves.items()})
    return LoadedLora(
        {part: unflatten_dict(tree) for part, tree in trees.items()},
        rank,
        alpha,
        {part: tuple(layers(tree)) for part, tree in base_like.items()},
    )


@dataclass(frozen=True)
class _Layer:
    """A layer of the model; the shape is that of its kernel."""

    part: str
    name: str
    path: Path
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Adapter:
    """What a file has for a layer, in Flax's layout."""

    down: Float[np.ndarray, "*n i r"]
    up: Float[np.ndarray, "*m r o"]
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[-1]


def _open(file: epath.Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if file.suffix in PICKLES:
        raise UserError(f"lora.pretrained: {file} is a pickle, which can run code: convert it to safetensors")
    tensors, metadata = open_file(file, "lora.pretrained")
    for kind, pattern in _OTHER_KINDS.items():
        if key := next(filter(pattern.search, tensors), None):
            raise UserError(f"lora.pretrained: {file} holds {kind} ({key}), which is not supported; use a plain LoRA")
    if not any(end.search(key) for key in tensors for end in _ENDINGS.values()):
        raise UserError(f"lora.pretrained: {file}: it holds no adapters; is it a model? Give that as model.pretrained")
    return tensors, metadata


def _known(part: str, tree: PyTree, kohya: Kohya) -> dict[str, _Layer]:
    kernels = flatten_dict(tree)
    found = {name: _Layer(part, name, path, kernels[*path, "kernel"].shape) for name, path in layers(tree).items()}
    return {key: found[name] for key, name in known_names(part, found, kohya).items()}


def _by_layer(
    tensors: Mapping[str, Tensor], known: Mapping[str, _Layer]
) -> tuple[dict[_Layer, dict[str, Tensor]], list[str]]:
    """The `down`, `up` and `alpha` of each layer, and what is wrong with other keys."""
    found: dict[_Layer, dict[str, Tensor]] = {}
    problems = []
    for key, tensor in tensors.items():
        half, ending = next(((half, end) for half, end in _ENDINGS.items() if end.search(key)), ("", re.compile("$")))
        name = ending.sub("", key).replace(".processor.", ".").replace("base_model.model.", "")
        layer = known.get(name) if half else None
        if layer is None:
            problems.append(f"{key} is of no layer of the model")
        elif half in found.setdefault(layer, {}):
            problems.append(f"{key} is there by another name too")
        else:
            found[layer][half] = tensor
    return found, problems


def _adapter(layer: _Layer, given: Mapping[str, Tensor], configs: Mapping[str, Any]) -> _Adapter:
    """Raises ValueError, which says what is wrong."""
    for half in ("down", "up"):
        if half not in given:
            raise ValueError(f"has no {half} weight")
    *window, inputs, outputs = layer.shape
    down, up = _with_ndim(given["down"], len(layer.shape)), _with_ndim(given["up"], len(layer.shape))
    rank = down.shape[0] if down.shape else 0
    if not rank or (down.shape, up.shape) != ((rank, inputs, *window), (outputs, rank, *(1 for _ in window))):
        shapes = f"{given['down'].shape} and {given['up'].shape}"
        raise ValueError(f"has weights of shapes {shapes}, where the layer's own is {(outputs, inputs, *window)}")
    alpha = _alpha(layer, given.get("alpha"), configs, rank)
    return _Adapter(_flax_array(down), _flax_array(up), alpha)


def _alpha(layer: _Layer, tensor: Tensor | None, configs: Mapping[str, Any], rank: int) -> float:
    if tensor is not None and tensor.size == 1:
        # The shortest decimal that is this number in its dtype: 0.7 comes back as 0.7.
        alpha = float(str(tensor().reshape(-1)[0]))
    elif tensor is not None:
        raise ValueError(f"has an alpha of shape {tensor.shape}")
    else:
        alpha = _peft_alpha(layer, configs, rank)
    if not math.isfinite(alpha):
        raise ValueError(f"has alpha = {alpha}")
    return alpha or float(rank)


def _peft_configs(metadata: Mapping[str, str], file: epath.Path) -> dict[str, Any]:
    try:
        return parse_object(metadata.get(_PEFT_CONFIGS, "{}"))
    except ValueError as error:
        raise UserError(f"lora.pretrained: {file} is damaged ({_PEFT_CONFIGS}: {error}); fetch it again") from error


def _peft_alpha(layer: _Layer, configs: Mapping[str, Any], rank: int) -> float:
    alpha = configs.get(f"{layer.part}.lora_alpha", rank)
    patterns = configs.get(f"{layer.part}.alpha_pattern") or {}
    try:
        matching = [value for pattern, value in patterns.items() if _is_named(layer.name, pattern)]
        return float((matching or [alpha])[0]) * (math.sqrt(rank) if configs.get(f"{layer.part}.use_rslora") else 1.0)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"has no readable alpha in {_PEFT_CONFIGS} of the header ({one_line(error)})") from error


def _is_named(name: str, pattern: str) -> bool:
    """Whether PEFT's `alpha_pattern` means a layer: its name, or the end of it from a dot on; with `^` the whole name.

    PEFT compiles the pattern as a regular expression, which a stranger can write so that it never ends. What programs
    write are names: these are compared as text.

    Raises:
        ValueError: it is no name.
    """
    if not (plain := re.fullmatch(r"(\^?)((?:\w|-|\\?\.)+)\$?", pattern)):
        raise ValueError(f"the pattern {pattern[:80]!r} is no name of a layer")
    end = plain[2].replace("\\", "")
    return name == end or (not plain[1] and name.endswith(f".{end}"))


def _alike(adapters: Mapping[_Layer, _Adapter]) -> tuple[int, float, dict[_Layer, dict[str, np.ndarray]]]:
    """The common rank, the common alpha, and the halves of each layer with these."""
    usual, _ = Counter((each.alpha, each.rank) for each in adapters.values()).most_common(1)[0]
    usual_alpha, usual_rank = usual
    rank = max(each.rank for each in adapters.values())

    def padded(array: np.ndarray, axis: int) -> np.ndarray:
        widths = [(0, 0)] * array.ndim
        widths[axis] = (0, rank - array.shape[axis])
        return np.pad(array, widths)

    def halves(each: _Adapter) -> dict[str, np.ndarray]:
        ratio = each.alpha * usual_rank / (each.rank * usual_alpha)
        return {"down": padded(each.down, -1), "up": padded(each.up * np.float32(ratio), -2)}

    return rank, usual_alpha * (rank / usual_rank), {layer: halves(each) for layer, each in adapters.items()}


def _with_ndim(tensor: Tensor, ndim: int) -> Tensor:
    """A 1x1 convolution's weight as a matrix, or the reverse: files differ in it."""
    is_reducible = len(tensor.shape) >= 2 and all(length == 1 for length in tensor.shape[ndim:])
    return with_ndim(tensor, ndim) if is_reducible else tensor


def _flax_array(half: Tensor) -> Float[np.ndarray, "*n i o"]:
    return from_torch(_KERNEL, half()).astype(np.float32)
