"""Configurations: typed defaults, files of `get_config()`, and `--config.path=value` on the command line.

A config file is Python that starts from `default_config()` and changes what it needs. The dictionary is locked and
typed, so that a mistyped key or a wrong type fails where it is written. The path of a field is the name of the
module that reads it: `noise.offset_strength` is read by `offsetjax.diffusion.noise`.
"""

import ast
import difflib
import hashlib
import json
import math
import re
import runpy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from offsetjax.defaults import FOREIGN_NAMES, default_config
from offsetjax.errors import UserError

__all__ = ["default_config", "digest", "flatten", "from_json", "load_config", "override", "to_json", "validate"]


def _one_of(*names: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in names, "one of " + ", ".join(names)


def _at_least(bound: float) -> tuple[Callable[[Any], bool], str]:
    return lambda value: math.isfinite(value) and value >= bound, f"at least {bound}"


_SHARE = (lambda value: 0 <= value <= 1, "between 0 and 1")
_POSITIVE = (lambda value: math.isfinite(value) and value > 0, "above 0")
_PARTS = ("unet", "vae", "text_encoder", "tokenizer")

_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (lambda value: 0 <= value < 2**32, "between 0 and 2**32 - 1"),
    "task": _one_of("diffusion", "autoencoder"),
    "train.steps": _at_least(1),
    "train.global_batch_size": _at_least(1),
    "train.accumulate_steps": _at_least(1),
    "train.log_every_steps": _at_least(1),
    "data.resolution": _at_least(8),
    "data.num_workers": _at_least(0),
    "encode.caption_dropout": _SHARE,
    "model.from_scratch": (lambda value: all(part in _PARTS for part in value), "made of " + ", ".join(_PARTS)),
    "model.dtype": _one_of("float32", "bfloat16"),
    "model.vae.scaling_factor": _at_least(0),
    "noise.offset_strength": _at_least(0),
    "schedule.num_train_timesteps": _at_least(2),
    "schedule.beta_start": (lambda value: 0 < value < 1, "between 0 and 1, exclusive"),
    "schedule.beta_end": (lambda value: 0 < value < 1, "between 0 and 1, exclusive"),
    "schedule.prediction_type": _one_of("epsilon", "v_prediction"),
    "loss.min_snr_gamma": _at_least(0),
    "loss.min_timestep": _at_least(0),
    "loss.kl_weight": _at_least(0),
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.warmup_steps": _at_least(0),
    "optimizer.decay": _one_of("cosine", "linear", "constant"),
    "optimizer.b1": _SHARE,
    "optimizer.b2": _SHARE,
    "optimizer.eps": _POSITIVE,
    "optimizer.weight_decay": _at_least(0),
    "optimizer.max_grad_norm": _POSITIVE,
    "optimizer.ema_decay": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
    "mesh.data": (lambda value: value == -1 or value >= 1, "-1 or at least 1"),
    "mesh.fsdp": (lambda value: value == -1 or value >= 1, "-1 or at least 1"),
    "checkpoint.every_steps": _at_least(1),
    "checkpoint.max_to_keep": _at_least(1),
    "sample.every_steps": _at_least(0),
    "sample.prompts": (lambda value: all(isinstance(prompt, str) for prompt in value), "texts"),
    "sample.seeds_per_prompt": _at_least(1),
    "sample.num_steps": _at_least(1),
    "sample.guidance_scale": _at_least(0),
    "sample.spacing": _one_of("trailing", "leading"),
    "sample.start_noise": _one_of("matched", "plain"),
    "sample.params": _one_of("ema", "raw"),
}


def flatten(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields `("noise.offset_strength", value)` for each field, in the order of definition."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def validate(config: ConfigDict) -> None:
    """Checks every value's range and the combinations.

    Raises:
        UserError: with the field, its value and what it must be.
    """
    values = dict(flatten(config))
    for path, (is_valid, requirement) in _CHECKS.items():
        if not is_valid(values[path]):
            raise UserError(f"config: {path} = {values[path]!r} must be {requirement}")
    if values["train.global_batch_size"] % values["train.accumulate_steps"]:
        raise UserError(
            f"config: train.global_batch_size = {values['train.global_batch_size']} must be a multiple of "
            f"train.accumulate_steps = {values['train.accumulate_steps']}"
        )
    if values["loss.min_timestep"] >= values["schedule.num_train_timesteps"]:
        raise UserError(
            f"config: loss.min_timestep = {values['loss.min_timestep']} must be below "
            f"schedule.num_train_timesteps = {values['schedule.num_train_timesteps']}"
        )
    if values["mesh.data"] == -1 and values["mesh.fsdp"] == -1:
        raise UserError("config: only one of mesh.data and mesh.fsdp can be -1 (all devices that are left)")
    if values["schedule.beta_start"] >= values["schedule.beta_end"]:
        raise UserError("config: schedule.beta_start must be below schedule.beta_end")
    # "leading" starts one step late (steps_offset = 1): with as many steps as the schedule it would start beyond it.
    most = values["schedule.num_train_timesteps"] - (values["sample.spacing"] == "leading")
    if values["sample.num_steps"] > most:
        raise UserError(
            f"config: sample.num_steps = {values['sample.num_steps']} must be at most {most} with "
            f"sample.spacing = {values['sample.spacing']!r}"
        )
    if values["sample.params"] == "ema" and values["optimizer.ema_decay"] == 0 and values["sample.every_steps"]:
        raise UserError("config: sample.params = 'ema' needs optimizer.ema_decay above 0; or set sample.params = 'raw'")
    if values["task"] == "autoencoder" and values["noise.offset_strength"]:
        raise UserError("config: noise.offset_strength cannot apply to task = 'autoencoder'; set it to 0")


def load_config(path: str, overrides: Sequence[tuple[str, str]] = ()) -> ConfigDict:
    """Runs a config file and applies `--config.path=value` overrides.

    Args:
        path: a local Python file that defines `get_config() -> ConfigDict`.
        overrides: pairs of a field's path and its value as text.

    Raises:
        UserError: a missing or broken file, an unknown key, a wrong type, a value out of range.
    """
    if "://" in path or not epath.Path(path).is_file():
        raise UserError(f"config: {path} is not a local file; give a path such as configs/stamps.py")
    try:
        config = runpy.run_path(path)["get_config"]()
    except UserError:
        raise
    except Exception as error:  # a config file is the user's own Python: anything may be raised
        raise UserError(f"config: {path}: {_describe(error)}") from error
    if not isinstance(config, ConfigDict) or dict(flatten(config)).keys() != dict(flatten(default_config())).keys():
        raise UserError(f"config: {path}: get_config() must return the ConfigDict of default_config()")
    for key, text in overrides:
        override(config, key, text)
    validate(config)
    return config


def _describe(error: Exception) -> str:
    if isinstance(error, KeyError) and error.args == ("get_config",):
        return "no function get_config(); see configs/stamps.py for the form"
    if key := _unknown_key(error):
        return f"unknown key {key!r}; {_nearest(key)}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _unknown_key(error: Exception) -> str | None:
    """The key that the dictionary does not have; None where the error is another's."""
    if locked := re.search(r'Key "(.+?)" does not exist', str(error)):
        return locked[1]
    return error.name if isinstance(error, AttributeError) and isinstance(error.obj, ConfigDict) else None


def _nearest(key: str) -> str:
    leaf = key.rsplit(".", 1)[-1]
    if leaf in FOREIGN_NAMES:
        return f"it is called {FOREIGN_NAMES[leaf]} here"
    paths = [path for path, _ in flatten(default_config())]
    sections = {section: section for path in paths for section in path.split(".")[:-1]}
    by_leaf = sections | {path.rsplit(".", 1)[-1]: path for path in paths}
    near = difflib.get_close_matches(key, paths, 1, 0.5) or [
        by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, 1, 0.5)
    ]
    return f"did you mean {near[0]}?" if near else "see offsetjax/defaults.py for the list"


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets one field from text, keeping its type.

    Raises:
        UserError: an unknown key, with the nearest valid one, or text that is not of the field's type.
    """
    values = dict(flatten(config))
    if key not in values:
        raise UserError(f"config: unknown key {key!r}; {_nearest(key)}")
    old = values[key]
    try:
        new = _parse(text, old)
    except (ValueError, TypeError, SyntaxError):
        raise UserError(f"config: {key} = {text!r} is not of type {type(old).__name__}, such as {old!r}") from None
    section, _, leaf = key.rpartition(".")
    node = config
    for name in section.split(".") if section else ():
        node = node[name]
    with node.ignore_type():
        node[leaf] = new


def _parse(text: str, like: Any) -> Any:
    if isinstance(like, bool):
        return {"true": True, "false": False}[text.lower()] if text.lower() in ("true", "false") else _fail(text)
    if isinstance(like, int):
        return int(text)
    if isinstance(like, float):
        return float(text)
    if isinstance(like, tuple):
        value = ast.literal_eval(text)
        return tuple(value) if isinstance(value, list | tuple) else (value,)
    return text


def _fail(text: str) -> Any:
    raise ValueError(text)


def to_json(config: ConfigDict) -> str:
    """The config as indented JSON, the form kept in a work directory."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
    """The config that `to_json` wrote.

    Raises:
        UserError: a field that this version does not know.
    """
    config = default_config()
    known = dict(flatten(config))
    for path, value in flatten(ConfigDict(json.loads(text), convert_dict=True)):
        if path not in known:
            raise UserError(f"config: unknown key {path!r} in a stored config.json; {_nearest(path)}")
        section, _, leaf = path.rpartition(".")
        node = config
        for name in section.split(".") if section else ():
            node = node[name]
        with node.ignore_type():
            node[leaf] = tuple(value) if isinstance(value, list) else value
    return config


def digest(path: str) -> str:
    """The SHA-256 of a config file, in hexadecimal."""
    return hashlib.sha256(epath.Path(path).read_bytes()).hexdigest()
