"""What a checkpoint says of itself, and what a config says of it: the family, the architecture, the schedule."""

import logging
from typing import Any

from ml_collections import ConfigDict

from offsetjax.config import assign, flatten, is_explicit
from offsetjax.config.checks import shown
from offsetjax.config.field import Field
from offsetjax.config.schema import default, fields
from offsetjax.diffusion.process import recognised
from offsetjax.errors import UserError
from offsetjax.formats.pretrained import Pretrained, open_pretrained
from offsetjax.models.family import FAMILIES, family_of
from offsetjax.models.pipeline import network_parts

_log = logging.getLogger("offsetjax")

_ACTIVATIONS = ("quick_gelu", "gelu")

# diffusers' samplers of the schedules that a Stable Diffusion is trained with; of others, such as EDM's and flow
# matching's, the same fields mean something else, or are not there.
_SCHEDULERS = (
    *("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "DEISMultistepScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler", "EulerDiscreteScheduler"),
    *("EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler"),
    *("KDPM2AncestralDiscreteScheduler", "LCMScheduler", "PNDMScheduler", "SASolverScheduler", "TCDScheduler"),
    "UniPCMultistepScheduler",
)

# What a checkpoint's config.json may say of things that this boundary does not vary.
_REQUIRED: dict[str, dict[str, tuple[Any, ...]]] = {
    "unet": {
        "act_fn": ("silu", "swish"),
        "addition_embed_type": (None, "text_time"),
        "attention_type": ("default",),
        "center_input_sample": (False,),
        "class_embed_type": (None,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "cross_attention_norm": (None,),
        "downsample_padding": (1,),
        "dual_cross_attention": (False,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "in_channels": (4,),
        "mid_block_scale_factor": (1,),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "norm_eps": (1e-5,),
        "num_attention_heads": (None,),  # the number of heads goes by the name of attention_head_dim
        "only_cross_attention": (False,),
        "resnet_out_scale_factor": (1.0,),
        "resnet_skip_time_act": (False,),
        "resnet_time_scale_shift": ("default",),
        "reverse_transformer_layers_per_block": (None,),
        "time_cond_proj_dim": (None,),
        "time_embedding_dim": (None,),
        "time_embedding_type": ("positional",),
        "timestep_post_act": (None,),
    },
    "vae": {
        "act_fn": ("silu", "swish"),
        "use_quant_conv": (True,),
        "use_post_quant_conv": (True,),
        "shift_factor": (None,),
        "latents_mean": (None,),
        "latents_std": (None,),
    },
    "text_encoder": {"hidden_act": _ACTIVATIONS},
    "text_encoder_2": {"hidden_act": _ACTIVATIONS},
    "scheduler": {
        "_class_name": _SCHEDULERS,
        "beta_schedule": ("scaled_linear",),
        "prediction_type": ("epsilon", "v_prediction"),
        "trained_betas": (None,),
        **dict.fromkeys(("use_flow_sigmas", "use_beta_sigmas", "use_exponential_sigmas"), (False, None)),
    },
}

# What diffusers takes where a config.json does not say it.
_BY_DEFAULT: dict[str, dict[str, Any]] = {"scheduler": {"beta_schedule": "linear"}}

# What no network depends on: a preset's value gives way to the checkpoint's. Files differ in these, and a single file
# of Stable Diffusion 2 does not say the second.
_WITHOUT_EFFECT = ("model.vae.sample_size", "model.text_encoder.projection_dim")


def is_from_scratch(config: ConfigDict, part: str) -> bool:
    """Whether a part is drawn at random rather than loaded."""
    return not config.model.pretrained or part in config.model.from_scratch


def resolve(config: ConfigDict) -> ConfigDict:
    """The config with the family, the architecture and the schedule of `model.pretrained`.

    Raises:
        UserError: a setting of the user's that contradicts the checkpoint, or a family that is not supported.
    """
    config = config.copy_and_resolve_references()
    if config.model.pretrained:
        _adopt(config, open_pretrained(config.model.pretrained, config.model.variant))
    elif config.model.from_scratch:
        raise UserError("config: model.from_scratch cannot apply without model.pretrained: all is drawn at random")
    assign(config, "model.family", family_of(config).name, explicit=False)
    check_architecture(config)
    return config


def _adopt(config: ConfigDict, pretrained: Pretrained) -> None:
    if pretrained.family and config.task == "diffusion" and config.model.family not in ("", pretrained.family):
        title = FAMILIES[pretrained.family].title
        raise UserError(
            f"config: model.family = {config.model.family!r}, but {pretrained.path} is a {title} "
            f"model ({pretrained.family}); give another model.pretrained, or leave model.family out"
        )
    if config.task == "diffusion" and pretrained.family:
        assign(config, "model.family", pretrained.family, explicit=False)
    sections = {part: config.model[part] for part in network_parts(config) if not is_from_scratch(config, part)}
    if config.task == "diffusion" and not is_from_scratch(config, family_of(config).denoiser):
        sections["scheduler"] = config.schedule
    declared, denoiser = fields(), family_of(config).denoiser
    for part, section in sections.items():
        stored = pretrained.read_config(part)
        if part == "scheduler":
            said, usual = recognised(stored), default("schedule.process")
            if said is None or said["process"] == usual:
                _require(part, stored, str(pretrained.path))
                if config.schedule.process != usual:
                    _log.info("%s is trained as %s: it becomes a %s", pretrained.path, usual, config.schedule.process)
                    continue
            stored = said or stored
        else:
            _require(part, stored, str(pretrained.path))
        prefix = "schedule." if part == "scheduler" else f"model.{part}."
        for key in section:
            if key not in stored or (prefix + key == "schedule.shift" and is_explicit(config, "schedule.shift")):
                continue
            value = _normalise(stored[key], key, len(section.get("block_out_channels", ())), section[key])
            _check_value(f"model.pretrained: {pretrained.path}: {part} has {key}", declared[prefix + key], value)
            _adopt_value(config, prefix + key, value, pretrained, denoiser if part == "scheduler" else part)
    if config.task == "diffusion" and pretrained.has("model_index"):
        path, index = "model.force_zeros_for_empty_prompt", pretrained.read_config("model_index")
        zeros = bool(index.get("force_zeros_for_empty_prompt", False))
        if "force_zeros_for_empty_prompt" in index or not is_explicit(config, path):
            _adopt_value(config, path, zeros, pretrained)


def _adopt_value(config: ConfigDict, path: str, value: Any, pretrained: Pretrained, part: str = "") -> None:
    """Fills in what a checkpoint says of a field.

    Raises:
        UserError: the config says otherwise.
    """
    given = dict(flatten(config))[path]
    is_stated = is_explicit(config, path) or given != default(path)
    if is_stated and given != value and path not in _WITHOUT_EFFECT:
        anew = f", or add {part} to model.from_scratch" if part else ""
        raise UserError(
            f"config: {path} = {given!r}, but {pretrained.path} has {value!r}; set it to that, or leave it out{anew}"
        )
    assign(config, path, value, explicit=False)


def _require(part: str, stored: dict[str, Any], directory: str) -> None:
    stored = {**_BY_DEFAULT.get(part, {}), **stored}
    for key, allowed in _REQUIRED.get(part, {}).items():
        if key in stored and stored[key] not in allowed:
            raise UserError(
                f"model.pretrained: {directory}: {part} has {key} = {stored[key]!r}, which is not supported "
                f"(supported: {', '.join(map(repr, allowed))}); use a Stable Diffusion 1.x, 2.x or XL base model"
            )


def _normalise(value: Any, key: str, blocks: int, like: Any) -> Any:
    if key in ("attention_head_dim", "transformer_layers_per_block") and isinstance(value, int):
        return (value,) * blocks
    if value is None:
        return type(like)()
    return tuple(value) if isinstance(value, list) else value


def _check_value(what: str, field: Field, value: Any) -> None:
    """Raises a UserError unless a value of a config.json is of its field's type and in its range."""
    if not field.has_type(value):
        raise UserError(f"{what} = {shown(value)}, where others have such as {field.example!r}; fetch it again")
    if not field.holds(value):
        remedy = field.range.remedy(value) or "fetch it again, or give another model"
        raise UserError(f"{what} = {shown(value)}, which must be {field.range.words}; {remedy}")


def check_architecture(config: ConfigDict) -> None:
    """Raises a UserError unless the autoencoder takes pictures, and the denoiser what the other networks give."""
    model, family = config.model, family_of(config)
    is_sdxl = family.name == "sdxl"
    if (model.vae.in_channels, model.vae.out_channels) != (3, 3):
        raise UserError("config: model.vae.in_channels and model.vae.out_channels must be 3: red, green and blue")
    if config.task != "diffusion":
        return
    channels = model.vae.latent_channels
    if (model.unet.in_channels, model.unet.out_channels) != (channels, channels):
        raise UserError(
            f"config: model.unet.in_channels = {model.unet.in_channels} and model.unet.out_channels = "
            f"{model.unet.out_channels} must be {channels}, the model.vae.latent_channels"
        )
    hidden = sum(model[part].hidden_size for part in family.encoders)
    if model.unet.cross_attention_dim != hidden:
        raise UserError(
            f"config: model.unet.cross_attention_dim = {model.unet.cross_attention_dim} must be {hidden}, the hidden "
            f"size of {' and '.join(family.encoders)}"
        )
    if is_sdxl != (model.unet.addition_embed_type == "text_time"):
        raise UserError(
            f"config: model.unet.addition_embed_type = {model.unet.addition_embed_type!r} does not go with "
            f"model.family = {model.family!r}; it is 'text_time' in SDXL alone"
        )
    pooled = model.text_encoder_2.projection_dim + 6 * model.unet.addition_time_embed_dim
    if is_sdxl and model.unet.projection_class_embeddings_input_dim != pooled:
        raise UserError(
            f"config: model.unet.projection_class_embeddings_input_dim must be {pooled}: the projection of "
            "text_encoder_2 and six embeddings of addition_time_embed_dim"
        )


def check_resolution(config: ConfigDict) -> None:
    """Raises a UserError unless pictures of `data.resolution` can be halved as often as the networks do."""
    family = family_of(config)
    networks = (family.autoencoder, family.denoiser) if config.task == "diffusion" else (family.autoencoder,)
    unit = 2 ** sum(len(config.model[part].block_out_channels) - 1 for part in networks)
    if config.data.resolution % unit:
        raise UserError(
            f"config: data.resolution = {config.data.resolution} must be a multiple of {unit}, "
            f"which the blocks of {' and '.join(networks)} halve it by"
        )
