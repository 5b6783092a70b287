"""The names of Stable Diffusion's original layout (LDM, sgm) against those of diffusers, for any number of layers.

One list of rules a part is read in both directions. The original numbers the denoiser's blocks through (each resnet,
with its transformer, and each resampling is one), holds the autoencoder's attention as 1x1 convolutions and numbers the
blocks of its decoder from the last. OpenCLIP's text encoders hold query, key and value of a layer in one matrix, and
the projection transposed; CLIP's have the names of transformers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from offsetjax.formats.tensors import Tensor, concatenated, rows, transposed, with_ndim

UNET = "model.diffusion_model."
VAE = "first_stage_model."


@dataclass(frozen=True)
class Rule:
    """One tensor of the original, and the names in diffusers of what it holds.

    Attributes:
        names: several for a matrix that is several in diffusers, one below the other.
        change: what the original does otherwise.
    """

    original: str
    names: tuple[str, ...]
    change: Literal["", "convolution", "transposed"] = ""

    def to_diffusers(self, tensor: Tensor) -> dict[str, Tensor]:
        """The original's tensor by diffusers' names.

        Raises:
            ValueError: it has a shape that cannot be.
        """
        if self.change == "convolution":
            tensor = with_ndim(tensor, 2)
        elif self.change == "transposed":
            tensor = transposed(tensor, (1, 0))
        count = len(self.names)
        if count == 1:
            return {self.names[0]: tensor}
        if not tensor.shape or tensor.shape[0] % count:
            raise ValueError(f"shape {tensor.shape} does not hold {count} of the same shape")
        height = tensor.shape[0] // count
        return {name: rows(tensor, i * height, (i + 1) * height) for i, name in enumerate(self.names)}

    def to_original(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The inverse, of a part's tensors by diffusers' names."""
        held = [tensors[name] for name in self.names]
        tensor = held[0] if len(held) == 1 else concatenated(held)
        if self.change == "convolution":
            return with_ndim(tensor, 4)
        return transposed(tensor, (1, 0)) if self.change == "transposed" else tensor


def _same(original: str, name: str) -> Iterator[Rule]:
    for leaf in (".weight", ".bias"):
        yield Rule(original + leaf, (name + leaf,))


def unet_rules(config: Mapping[str, Any]) -> Iterator[Rule]:
    """The denoiser's, of its configuration in diffusers' names."""
    for original, name in {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }.items():
        yield from _same(UNET + original, name)
    if config.get("addition_embed_type") == "text_time":
        yield from _same(UNET + "label_emb.0.0", "add_embedding.linear_1")
        yield from _same(UNET + "label_emb.0.2", "add_embedding.linear_2")
    depths = transformer_layers(config)
    yield from _down_rules(config, depths)
    yield from _unet_resnet(f"{UNET}middle_block.0", "mid_block.resnets.0", has_shortcut=False)
    yield from _transformer(f"{UNET}middle_block.1", "mid_block.attentions.0", depths[-1])
    yield from _unet_resnet(f"{UNET}middle_block.2", "mid_block.resnets.1", has_shortcut=False)
    yield from _up_rules(config, depths[::-1])


def transformer_layers(config: Mapping[str, Any]) -> list[int]:
    """The number of layers of the transformers of each block, on the way down."""
    layers = config.get("transformer_layers_per_block", 1)
    return [layers] * len(config["block_out_channels"]) if isinstance(layers, int) else list(layers)


def _down_rules(config: Mapping[str, Any], depths: list[int]) -> Iterator[Rule]:
    widths, number = config["block_out_channels"], 0
    before = widths[0]
    for block, (kind, width) in enumerate(zip(config["down_block_types"], widths, strict=True)):
        for layer in range(config["layers_per_block"]):
            number += 1
            original, name = f"{UNET}input_blocks.{number}", f"down_blocks.{block}"
            yield from _unet_resnet(f"{original}.0", f"{name}.resnets.{layer}", before != width)
            if "CrossAttn" in kind:
                yield from _transformer(f"{original}.1", f"{name}.attentions.{layer}", depths[block])
            before = width
        if block + 1 < len(widths):
            number += 1
            yield from _same(f"{UNET}input_blocks.{number}.0.op", f"down_blocks.{block}.downsamplers.0.conv")


def _up_rules(config: Mapping[str, Any], depths: list[int]) -> Iterator[Rule]:
    widths, number = config["block_out_channels"][::-1], 0
    before, layers = widths[0], config["layers_per_block"] + 1
    for block, (kind, width) in enumerate(zip(config["up_block_types"], widths, strict=True)):
        has_attention = "CrossAttn" in kind
        for layer in range(layers):
            original, name = f"{UNET}output_blocks.{number}", f"up_blocks.{block}"
            # What comes across from the way down has this block's width, but the last has that of the block before.
            across = widths[min(block + 1, len(widths) - 1)] if layer == layers - 1 else width
            yield from _unet_resnet(f"{original}.0", f"{name}.resnets.{layer}", before + across != width)
            if has_attention:
                yield from _transformer(f"{original}.1", f"{name}.attentions.{layer}", depths[block])
            before = width
            if layer == layers - 1 and block + 1 < len(widths):
                yield from _same(f"{original}.{1 + has_attention}.conv", f"{name}.upsamplers.0.conv")
            number += 1


def _unet_resnet(original: str, name: str, has_shortcut: bool) -> Iterator[Rule]:
    names = {
        "in_layers.0": "norm1",
        "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj",
        "out_layers.0": "norm2",
        "out_layers.3": "conv2",
    } | ({"skip_connection": "conv_shortcut"} if has_shortcut else {})
    for old, new in names.items():
        yield from _same(f"{original}.{old}", f"{name}.{new}")


def _transformer(original: str, name: str, depth: int) -> Iterator[Rule]:
    modules = ["norm", "proj_in", "proj_out"]
    for layer in range(depth):
        block = f"transformer_blocks.{layer}"
        parts = ("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2", "attn1.to_out.0", "attn2.to_out.0")
        modules += [f"{block}.{part}" for part in parts]
        for attention in ("attn1", "attn2"):  # whose inputs have no bias
            for part in ("to_q", "to_k", "to_v"):
                weight = f"{block}.{attention}.{part}.weight"
                yield Rule(f"{original}.{weight}", (f"{name}.{weight}",))
    for module in modules:
        yield from _same(f"{original}.{module}", f"{name}.{module}")


def vae_rules(config: Mapping[str, Any]) -> Iterator[Rule]:
    """The autoencoder's, of its configuration in diffusers' names."""
    widths, layers = list(config["block_out_channels"]), config["layers_per_block"]
    last = len(widths) - 1
    for name in ("quant_conv", "post_quant_conv"):
        yield from _same(VAE + name, name)
    for half in ("encoder", "decoder"):
        yield from _same(f"{VAE}{half}.conv_in", f"{half}.conv_in")
        yield from _same(f"{VAE}{half}.norm_out", f"{half}.conv_norm_out")
        yield from _same(f"{VAE}{half}.conv_out", f"{half}.conv_out")
        for number in range(2):
            yield from _vae_resnet(f"{VAE}{half}.mid.block_{number + 1}", f"{half}.mid_block.resnets.{number}", False)
        yield from _vae_attention(f"{VAE}{half}.mid.attn_1", f"{half}.mid_block.attentions.0")
    for block, width in enumerate(widths):
        original, name = f"{VAE}encoder.down.{block}", f"encoder.down_blocks.{block}"
        for layer in range(layers):
            changes = layer == 0 and width != widths[max(block - 1, 0)]
            yield from _vae_resnet(f"{original}.block.{layer}", f"{name}.resnets.{layer}", changes)
        if block < last:
            yield from _same(f"{original}.downsample.conv", f"{name}.downsamplers.0.conv")
        original, name = f"{VAE}decoder.up.{block}", f"decoder.up_blocks.{last - block}"
        for layer in range(layers + 1):
            changes = layer == 0 and width != widths[min(block + 1, last)]
            yield from _vae_resnet(f"{original}.block.{layer}", f"{name}.resnets.{layer}", changes)
        if block > 0:
            yield from _same(f"{original}.upsample.conv", f"{name}.upsamplers.0.conv")


def _vae_resnet(original: str, name: str, has_shortcut: bool) -> Iterator[Rule]:
    for module in ("norm1", "conv1", "norm2", "conv2"):
        yield from _same(f"{original}.{module}", f"{name}.{module}")
    if has_shortcut:
        yield from _same(f"{original}.nin_shortcut", f"{name}.conv_shortcut")


def _vae_attention(original: str, name: str) -> Iterator[Rule]:
    yield from _same(f"{original}.norm", f"{name}.group_norm")
    for old, new in {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}.items():
        yield Rule(f"{original}.{old}.weight", (f"{name}.{new}.weight",), "convolution")
        yield Rule(f"{original}.{old}.bias", (f"{name}.{new}.bias",))


def clip_rules(config: Mapping[str, Any], prefix: str) -> Iterator[Rule]:
    """A CLIP text encoder's."""
    names = ["text_model.embeddings.token_embedding.weight", "text_model.embeddings.position_embedding.weight"]
    modules = ["text_model.final_layer_norm"]
    for layer in range(config["num_hidden_layers"]):
        attention = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")]
        inside = ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", *attention)
        modules += [f"text_model.encoder.layers.{layer}.{module}" for module in inside]
    names += [f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")]
    for name in names:
        yield Rule(prefix + name, (name,))


def open_clip_rules(config: Mapping[str, Any], prefix: str, has_projection: bool) -> Iterator[Rule]:
    """An OpenCLIP text encoder's, but for what diffusers' does not hold."""
    yield Rule(f"{prefix}token_embedding.weight", ("text_model.embeddings.token_embedding.weight",))
    yield Rule(f"{prefix}positional_embedding", ("text_model.embeddings.position_embedding.weight",))
    yield from _same(f"{prefix}ln_final", "text_model.final_layer_norm")
    if has_projection:
        yield Rule(f"{prefix}text_projection", ("text_projection.weight",), "transposed")
    for layer in range(config["num_hidden_layers"]):
        original, name = f"{prefix}transformer.resblocks.{layer}", f"text_model.encoder.layers.{layer}"
        for leaf in ("weight", "bias"):
            names = tuple(f"{name}.self_attn.{letter}_proj.{leaf}" for letter in "qkv")
            yield Rule(f"{original}.attn.in_proj_{leaf}", names)
        for old, new in {
            "attn.out_proj": "self_attn.out_proj",
            "ln_1": "layer_norm1",
            "ln_2": "layer_norm2",
            "mlp.c_fc": "mlp.fc1",
            "mlp.c_proj": "mlp.fc2",
        }.items():
            yield from _same(f"{original}.{old}", f"{name}.{new}")


# ln 100, at which CLIP's training clips the logarithm of what it multiplies similarities by.
LOGIT_SCALE = np.asarray(np.log(100.0), np.float32)


def unused_open_clip(config: Mapping[str, Any], prefix: str) -> dict[str, np.ndarray]:
    """What only the original holds of Stable Diffusion 2's text encoder: its last layer, the projection, the scale.

    The encoding is that of the layer before the last, so diffusers' text encoder ends there. Loaders of the original
    layout expect the names, and put the values to no use. Here the layer passes its input on (what it adds has the
    weight 0), and the projection is the identity.
    """
    width, hidden = config["hidden_size"], config["intermediate_size"]
    block = f"{prefix}transformer.resblocks.{config['num_hidden_layers']}"
    zeros = {
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "ln_1.bias": (width,),
        "ln_2.bias": (width,),
        "mlp.c_fc.weight": (hidden, width),
        "mlp.c_fc.bias": (hidden,),
        "mlp.c_proj.weight": (width, hidden),
        "mlp.c_proj.bias": (width,),
    }
    return {
        **{f"{block}.{name}": np.zeros(shape, np.float32) for name, shape in zeros.items()},
        **{f"{block}.{norm}.weight": np.ones(width, np.float32) for norm in ("ln_1", "ln_2")},
        f"{prefix}text_projection": np.eye(width, dtype=np.float32),
        f"{prefix}logit_scale": LOGIT_SCALE,
    }
