"""What a config leaves to others: family, architecture and schedule to its checkpoint, strengths or a spectrum of noise
to its calibration, rank and targets to its LoRA.

The first step of loading a model; `weights.py` is the second, and `trained.py` does both for one that is finished.
"""

import logging
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from offsetjax.config import assign, default_config, flatten, is_explicit
from offsetjax.config.field import Field
from offsetjax.config.schema import default, fields
from offsetjax.config.values import shown
from offsetjax.diffusion.calibration import filled, read_calibration
from offsetjax.diffusion.flow import SHIFTS, stored_scheduler, stored_shifts
from offsetjax.diffusion.process import make_process, recognised
from offsetjax.errors import UserError
from offsetjax.formats.pretrained import Pretrained
from offsetjax.formats.safetensors import read_metadata
from offsetjax.models.family import FAMILIES, Family, family_of, latents_of, open_checkpoint
from offsetjax.models.pipeline import is_from_scratch, network_parts
from offsetjax.models.task import task_of
from offsetjax.models.weights import read_lora_of

_log = logging.getLogger("offsetjax")


def resolve(config: ConfigDict) -> ConfigDict:
    """The config with the family, the architecture and the schedule of `model.pretrained`.

    Raises:
        UserError: a setting of the user's that contradicts the checkpoint, or a family that is not supported.
    """
    config = config.copy_and_resolve_references()
    if config.model.pretrained:
        _adopt(config, open_checkpoint(config.model.pretrained, config.model.variant))
    elif config.model.from_scratch:
        raise UserError("config: model.from_scratch cannot apply without model.pretrained: all is drawn at random")
    family = family_of(config.model)
    assign(config, "model.family", family.name, explicit=False)
    if config.lora.rank or config.lora.pretrained:
        for field, targets in default_targets(family).items():
            if config.lora[field] == default(f"lora.{field}") and not is_explicit(config, f"lora.{field}"):
                assign(config, f"lora.{field}", targets, explicit=False)
    check_architecture(config)
    return config


def default_targets(family: Family) -> dict[str, tuple[str, ...]]:
    """The layers that adapters go to where a config does not say, by the field of `lora` that says them."""
    return {"targets": family.lora_targets, "text_encoder_targets": family.text_encoder_lora_targets}


def _adopt(config: ConfigDict, pretrained: Pretrained) -> None:
    denoises = task_of(config).denoises
    if pretrained.family and denoises and config.model.family not in ("", pretrained.family):
        title = FAMILIES[pretrained.family].title
        raise UserError(
            f"config: model.family = {config.model.family!r}, but {pretrained.path} is a {title} "
            f"model ({pretrained.family}); give another model.pretrained, or leave model.family out"
        )
    if denoises and pretrained.family:
        assign(config, "model.family", pretrained.family, explicit=False)
    sections = {part: config.model[part] for part in network_parts(config) if not is_from_scratch(config.model, part)}
    if denoises and not is_from_scratch(config.model, family_of(config.model).denoiser):
        sections["scheduler"] = config.schedule
    declared, family = fields(), family_of(config.model)
    denoiser = family.denoiser
    for part, section in sections.items():
        stored = pretrained.read_config(part)
        if part == "scheduler":
            said, usual = recognised(stored), default("schedule.process")
            if said is None or said["process"] == usual:
                _require(family, part, stored, str(pretrained.path))
                _choose_conversion(config, said or stored, str(pretrained.path))
                if config.schedule.process != usual and config.schedule.conversion == "mapped":
                    stored = {key: value for key, value in (said or stored).items() if key != "process"}
                    said = None
                elif config.schedule.process != usual:
                    _log.info("%s is trained as %s: it becomes a %s", pretrained.path, usual, config.schedule.process)
                    continue
            elif config.schedule.conversion == "mapped":
                raise UserError(
                    f"config: schedule.conversion = 'mapped' cannot apply to {pretrained.path}, which is a flow "
                    "already; leave it out"
                )
            stored = _own_shifts(config, said, pretrained.metadata()) if said else stored
        else:
            _require(family, part, stored, str(pretrained.path))
        prefix = "schedule." if part == "scheduler" else f"model.{part}."
        for key in section:
            if key not in stored:
                continue
            value = _normalise(stored[key], key, len(section.get("block_out_channels", ())), section[key])
            _check_value(f"model.pretrained: {pretrained.path}: {part} has {key}", declared[prefix + key], value)
            _adopt_value(config, prefix + key, value, pretrained, denoiser if part == "scheduler" else part)
    if denoises and pretrained.has("model_index"):
        index = pretrained.read_config("model_index")
        for key, usual in family.files.said_by_index.items():
            if key in index or not is_explicit(config, f"model.{key}"):
                _adopt_value(config, f"model.{key}", bool(index.get(key, usual)), pretrained)


def _own_shifts(config: ConfigDict, said: Mapping[str, Any], header: Mapping[str, str]) -> dict[str, Any]:
    """What a scheduler says of a flow, with the shifts of training, if the header has them or the config sets them.

    A scheduler has the shift of drawing at one size, and no rule. A shift or a rule that the config sets is another
    training's, of which the model's own say nothing.
    """
    if any(is_explicit(config, f"schedule.{key}") for key in SHIFTS):
        return {key: value for key, value in said.items() if key not in SHIFTS}
    return {**said, **stored_shifts(header)}


def adopt_flow(config: ConfigDict, file: str) -> None:
    """Sets the schedule to that of a flow, where the header of a LoRA says that it makes one of its base.

    Raises:
        UserError: the config says another process, or that the base keeps to its own predictions.
    """
    header = read_metadata(file, "lora.pretrained")
    scheduler = stored_scheduler(header)
    if scheduler is None:
        return
    said = _own_shifts(config, recognised(scheduler) or {}, header)
    for field, value in (("process", said["process"]), ("conversion", "plain")):
        path = f"schedule.{field}"
        if is_explicit(config, path) and config.schedule[field] != value:
            raise UserError(
                f"config: {path} = {config.schedule[field]!r}, but {file} makes a flow of its base, which predicts the "
                "velocity n - x0; leave it out"
            )
    base = default_config().schedule
    own = {key: base[key] for key in ("beta_start", "beta_end", "prediction_type", "zero_terminal_snr")}
    for key, value in {**own, **said, "conversion": "plain"}.items():
        assign(config, f"schedule.{key}", value, explicit=False)


def _choose_conversion(config: ConfigDict, scheduler: Mapping[str, Any], path: str) -> None:
    """Sets how a model becomes a flow where the config does not say: mapped of v, plain of ε, as compared in small.

    Noise that changes with time has no mapped form.
    """
    schedule = config.schedule
    is_open = schedule.process == "flow" and not is_explicit(config, "schedule.conversion")
    is_velocity = scheduler.get("prediction_type") == "v_prediction"
    if is_open and schedule.conversion == "plain" and is_velocity and config.noise.kind != "adjusted":
        assign(config, "schedule.conversion", "mapped", explicit=False)
        _log.info(
            "%s predicts v: as a flow it keeps to its own timesteps and predictions (schedule.conversion = 'mapped'); "
            "'plain' makes it one that predicts the velocity n - x0",
            path,
        )


def _adopt_value(config: ConfigDict, path: str, value: Any, pretrained: Pretrained, part: str = "") -> None:
    """Fills in what a checkpoint says of a field.

    Raises:
        UserError: the config says otherwise.
    """
    given = dict(flatten(config))[path]
    is_stated = is_explicit(config, path) or given != default(path)
    if is_stated and given != value and path not in family_of(config.model).files.unread:
        anew = f", or add {part} to model.from_scratch" if part else ""
        raise UserError(
            f"config: {path} = {given!r}, but {pretrained.path} has {shown(value)}; set it to that, or leave it out"
            f"{anew}"
        )
    assign(config, path, value, explicit=False)


def _require(family: Family, part: str, stored: dict[str, Any], directory: str) -> None:
    stored = {**family.files.by_default.get(part, {}), **stored}
    for key, allowed in family.files.required.get(part, {}).items():
        if key in stored and stored[key] not in allowed:
            raise UserError(
                f"model.pretrained: {directory}: {part} has {key} = {shown(stored[key])}, which is not supported "
                f"(supported: {', '.join(map(repr, allowed))}); use another {family.title} model"
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
    family = family_of(config.model)
    vae = config.model[family.autoencoder]
    if (vae.get("in_channels", 3), vae.get("out_channels", 3)) != (3, 3):
        where = f"model.{family.autoencoder}"
        raise UserError(f"config: {where}.in_channels and {where}.out_channels must be 3: red, green and blue")
    if task_of(config).denoises:
        family.check(config.model)


def resolution_unit(config: ConfigDict) -> int:
    """What the sides of pictures must be a multiple of, in pixels, for the networks of a training."""
    family = family_of(config.model)
    return family.resolution_unit(config.model, _networks(config))


def _networks(config: ConfigDict) -> list[str]:
    family = family_of(config.model)
    return [part for part in (family.autoencoder, family.denoiser) if part in network_parts(config)]


def check_resolution(config: ConfigDict) -> None:
    """Raises a UserError unless pictures of `data.resolution` can be halved as often as the networks do."""
    unit, networks = resolution_unit(config), _networks(config)
    if config.data.resolution % unit:
        raise UserError(
            f"config: data.resolution = {config.data.resolution} must be a multiple of {unit}, "
            f"which the blocks of {' and '.join(networks)} halve it by"
        )


def calibrated(config: ConfigDict) -> ConfigDict:
    """The config with what `noise.calibration` fills in; the same config where that is empty.

    Raises:
        UserError: the file cannot be read, or what it says does not go with the config.
    """
    path, (channels, downscale) = config.noise.calibration, latents_of(config.model)
    if not path:
        return config
    process = make_process(config.schedule, downscale)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.noise = filled(
            config.noise, read_calibration(path), process, config.data.resolution, channels, downscale
        )
    return config


def adopt_lora(config: ConfigDict) -> tuple[str, ...]:
    """Sets rank, alpha and targets of `config.lora` to those of `lora.pretrained`, where there is one.

    Returns:
        The text encoders that it adapts.

    Raises:
        UserError: a setting that contradicts it, or adapters of a part that the config freezes.
    """
    if not config.lora.pretrained:
        return ()
    loaded = read_lora_of(config.model, config.lora.pretrained)
    adopt_flow(config, config.lora.pretrained)
    family = family_of(config.model)
    defaults = {**default_config().lora.to_dict(), **default_targets(family)}
    found: dict[str, Any] = {"rank": loaded.rank, "alpha": float(loaded.alpha)}
    found |= {"targets": loaded.targets(family.denoiser)} if family.denoiser in loaded.adapters else {}
    text = tuple(part for part in family.encoders if part in loaded.adapters)
    if text and not config.train.text_encoders:
        raise UserError(
            f"lora.pretrained: {config.lora.pretrained} adapts {text[0]}, which is frozen; set "
            "train.text_encoders = True; a tiny optimizer.text_encoder_learning_rate keeps it as it is"
        )
    if text:
        found["text_encoder_targets"] = loaded.targets(*text)
    settings = config.lora.to_dict()
    settings["alpha"] = settings["alpha"] or float(settings["rank"])  # what 0 says
    contradicted = {}
    for key, value in found.items():
        is_same = settings[key] == value or (isinstance(value, tuple) and set(settings[key]) == set(value))
        if not is_same and (is_explicit(config, f"lora.{key}") or config.lora[key] != defaults[key]):
            contradicted[key] = value
    if contradicted:
        given = ", ".join(f"lora.{key} = {config.lora[key]!r}" for key in contradicted)
        flags = [f"--config.lora.{key}={value}" for key, value in contradicted.items()]
        lines = " ".join(f'"{flag}"' if "(" in flag else flag for flag in flags)
        raise UserError(f"config: {given}, but {config.lora.pretrained} has others; train with its own: {lines}")
    for key, value in found.items():
        assign(config, f"lora.{key}", value, explicit=False)
    return text
