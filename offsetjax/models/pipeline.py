"""All parts of a latent diffusion model: built from a config, filled from a diffusers directory or at random."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Int, PyTree
from ml_collections import ConfigDict
from transformers import CLIPTokenizer

from offsetjax.config import default_config, flatten
from offsetjax.errors import UserError
from offsetjax.formats import diffusers as files
from offsetjax.formats.names import params_to_tensors, tensors_to_params
from offsetjax.models.autoencoder import Autoencoder
from offsetjax.models.text import TextEncoder, load_tokenizer, save_tokenizer, tokenize
from offsetjax.models.unet import UNet
from offsetjax.random import stream_key

TRAINED = {"diffusion": "unet", "autoencoder": "vae"}
FROZEN = {"diffusion": ("vae", "text_encoder"), "autoencoder": ()}

# What a checkpoint's config.json may say of things that this boundary does not vary.
_REQUIRED: dict[str, dict[str, tuple[Any, ...]]] = {
    "unet": {
        "act_fn": ("silu", "swish"),
        "addition_embed_type": (None,),
        "center_input_sample": (False,),
        "class_embed_type": (None,),
        "downsample_padding": (1,),
        "dual_cross_attention": (False,),
        "encoder_hid_dim": (None,),
        "mid_block_scale_factor": (1,),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "norm_eps": (1e-5,),
        "num_attention_heads": (None,),  # the number of heads goes by the name of attention_head_dim
        "only_cross_attention": (False,),
        "resnet_skip_time_act": (False,),
        "resnet_time_scale_shift": ("default",),
        "time_embedding_type": ("positional",),
        "transformer_layers_per_block": (1,),
    },
    "vae": {
        "act_fn": ("silu", "swish"),
        "use_quant_conv": (True,),
        "use_post_quant_conv": (True,),
        "shift_factor": (None,),
        "latents_mean": (None,),
        "latents_std": (None,),
    },
    "text_encoder": {},
    "scheduler": {
        "beta_schedule": ("scaled_linear",),
        "prediction_type": ("epsilon", "v_prediction"),
        "trained_betas": (None,),
    },
}


@dataclass(frozen=True)
class Pipeline:
    """The parts, without weights. An autoencoder's training uses `vae` alone, and has no tokenizer."""

    vae: Autoencoder
    unet: UNet
    text_encoder: TextEncoder
    tokenizer: CLIPTokenizer | None

    def tokenize(self, captions: Sequence[str]) -> Int[np.ndarray, "b n"]:
        """Token ids of captions, padded and cut to the text encoder's length."""
        return tokenize(self.tokenizer, list(captions))


def build(config: ConfigDict, tokenizer: CLIPTokenizer | None = None) -> Pipeline:
    """The parts of `config.model`."""
    model, dtype = config.model, jnp.dtype(config.model.dtype)
    return Pipeline(
        Autoencoder(model.vae.to_dict()),
        UNet(model.unet.to_dict(), dtype),
        TextEncoder(model.text_encoder.to_dict(), dtype),
        tokenizer,
    )


def parts(config: ConfigDict) -> tuple[str, ...]:
    """The parts with weights that `config.task` needs."""
    return (TRAINED[config.task], *FROZEN[config.task])


def is_from_scratch(config: ConfigDict, part: str) -> bool:
    """Whether a part is drawn at random rather than loaded."""
    return not config.model.pretrained or part in config.model.from_scratch


def resolve(config: ConfigDict) -> ConfigDict:
    """The config with the architecture, and the schedule, of `model.pretrained`.

    Raises:
        UserError: a setting of the user's that contradicts the checkpoint, or a family that is not supported.
    """
    config = config.copy_and_resolve_references()
    if config.model.from_scratch and not config.model.pretrained:
        raise UserError("config: model.from_scratch cannot apply without model.pretrained: all is drawn at random")
    sections = {part: config.model[part] for part in parts(config)}
    if config.task == "diffusion":
        sections["scheduler"] = config.schedule
    defaults = dict(flatten(default_config()))
    for part, section in sections.items():
        reference = "unet" if part == "scheduler" else part
        if is_from_scratch(config, reference):
            continue
        stored = files.read_config(config.model.pretrained, part)
        _require(part, stored, config.model.pretrained)
        prefix = "schedule." if part == "scheduler" else f"model.{part}."
        for key in section:
            if key not in stored:
                continue
            value = _normalise(stored[key], key, stored)
            if section[key] not in (value, defaults[prefix + key]):
                raise UserError(
                    f"config: {prefix}{key} = {section[key]!r}, but {config.model.pretrained} has {value!r}; "
                    f"leave it out, or add {reference} to model.from_scratch"
                )
            with section.ignore_type():
                section[key] = value
        if part == "scheduler" and stored.get("rescale_betas_zero_snr"):
            section.zero_terminal_snr = True
    return config


def _require(part: str, stored: dict[str, Any], directory: str) -> None:
    for key, allowed in _REQUIRED[part].items():
        if key in stored and stored[key] not in allowed:
            raise UserError(
                f"model.pretrained: {directory}/{part} has {key} = {stored[key]!r}, which is not supported "
                f"(supported: {', '.join(map(repr, allowed))}); use a Stable Diffusion 1.x or 2.x model"
            )


def _normalise(value: Any, key: str, stored: dict[str, Any]) -> Any:
    if key == "attention_head_dim" and isinstance(value, int):
        return (value,) * len(stored["block_out_channels"])
    return tuple(value) if isinstance(value, list) else value


def load_params(directory: epath.PathLike, part: str, model: Any) -> PyTree:
    """A part's float32 parameters, on the host, from a diffusers directory."""
    like = jax.eval_shape(model.init, jax.random.key(0))
    return tensors_to_params(files.read_tensors(directory, part), like, f"model.pretrained: {directory}/{part}")


def initial_params(config: ConfigDict, part: str, model: Any) -> PyTree:
    """A part's parameters before training: loaded, or drawn at random from the stream `init/part`."""
    if is_from_scratch(config, part):
        return jax.jit(model.init)(stream_key(config.seed, f"init/{part}"))
    return load_params(config.model.pretrained, part, model)


def save_part(
    directory: epath.PathLike, part: str, model: Any, params: PyTree, *, dtype: str = "float32", **metadata: str
) -> None:
    """Writes one part in diffusers' form; `metadata` goes into the header of its weights."""
    files.write_part(directory, part, model.torch_config(), params_to_tensors(params), dtype=dtype, metadata=metadata)


def save_frozen(directory: epath.PathLike, pipeline: Pipeline, frozen: PyTree, *, dtype: str = "float32") -> None:
    """Writes the parts that training does not change, so that a work directory needs no other."""
    for part, params in frozen.items():
        save_part(directory, part, getattr(pipeline, part), params, dtype=dtype)
    if pipeline.tokenizer is not None:
        save_tokenizer(pipeline.tokenizer, epath.Path(directory) / "tokenizer")


def load_frozen(directory: epath.PathLike, config: ConfigDict) -> tuple[Pipeline, PyTree]:
    """What `save_frozen` wrote, with the parts of `config`."""
    tokenizer = load_tokenizer(epath.Path(directory) / "tokenizer") if config.task == "diffusion" else None
    pipeline = build(config, tokenizer)
    return pipeline, {part: load_params(directory, part, getattr(pipeline, part)) for part in FROZEN[config.task]}
