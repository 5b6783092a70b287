"""What a config may hold: the range of every value; `rules.py` has what they may be together."""

import math
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from offsetjax.config.rules import combinations
from offsetjax.config.schema import flatten
from offsetjax.errors import UserError

Check = tuple[Callable[[Any], bool], str]


def _one_of(*names: str) -> Check:
    return lambda value: value in names, "one of " + ", ".join(name or "'' (found out)" for name in names)


def _at_least(bound: float) -> Check:
    return lambda value: math.isfinite(value) and value >= bound, f"at least {bound}"


_SHARE = (lambda value: 0 <= value <= 1, "between 0 and 1")
_POSITIVE = (lambda value: math.isfinite(value) and value > 0, "above 0")


def _numbers(least: float = -math.inf) -> Check:
    def are_numbers(values: Any) -> bool:
        return all(isinstance(each, int | float) and math.isfinite(each) and each >= least for each in values)

    return are_numbers, "numbers" if least == -math.inf else f"numbers, each at least {least:g}"


def _texts(kind: str) -> Check:
    return lambda values: all(isinstance(each, str) for each in values), kind


_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer")

CHECKS: dict[str, Check] = {
    "seed": (lambda value: 0 <= value < 2**32, "between 0 and 2**32 - 1"),
    "task": _one_of("diffusion", "autoencoder"),
    "train.steps": _at_least(1),
    "train.global_batch_size": _at_least(1),
    "train.accumulate_steps": _at_least(1),
    "train.log_every_steps": _at_least(1),
    "train.profile_steps": (
        lambda value: (
            not value or (len(value) == 2 and all(type(each) is int for each in value) and 1 <= value[0] <= value[1])
        ),
        "the first and the last step to trace, such as (20, 24), or ()",
    ),
    "train.stall_seconds": _at_least(0),
    "data.resolution": _at_least(8),
    "data.num_workers": _at_least(0),
    "encode.caption_dropout": _SHARE,
    "encode.long_captions": _one_of("truncate", "refuse"),
    "model.family": _one_of("", "sd1", "sd2", "sdxl"),
    "model.from_scratch": (lambda value: all(part in _PARTS for part in value), "made of " + ", ".join(_PARTS)),
    "model.dtype": _one_of("float32", "bfloat16"),
    "model.attention": _one_of("auto", "xla", "splash", "cudnn"),
    "model.remat": _one_of("none", "attention", "blocks", "full"),
    "model.scan_layers": _one_of("auto", "always", "never"),
    "model.unet.addition_embed_type": _one_of("", "text_time"),
    "lora.rank": _at_least(0),
    "lora.alpha": _at_least(0),
    "lora.targets": _texts("ends of layers' names"),
    "lora.text_encoder_targets": _texts("ends of layers' names"),
    "model.vae.scaling_factor": _at_least(0),
    "noise.kind": _one_of("offset", "pyramid", "spectral", "adjusted"),
    "noise.offset_strength": _at_least(0),
    "noise.channel_strengths": _numbers(least=0),
    "noise.probability": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "noise.adaptive_scale": (math.isfinite, "a finite number"),
    "noise.pyramid_discount": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
    "noise.pyramid_levels": (lambda value: 0 <= value <= 16, "between 0 and 16"),
    "noise.spectrum": _texts("formulas, as texts"),
    "noise.input_perturbation": _at_least(0),
    "noise.reference_resolution": _at_least(0),
    "noise.data_mean": _numbers(),
    "noise.data_mean_std": _numbers(least=0),
    "schedule.num_train_timesteps": _at_least(2),
    "schedule.beta_start": (lambda value: 0 < value < 1, "between 0 and 1, exclusive"),
    "schedule.beta_end": (lambda value: 0 < value < 1, "between 0 and 1, exclusive"),
    "schedule.prediction_type": _one_of("epsilon", "v_prediction"),
    "loss.min_snr_gamma": _at_least(0),
    "loss.min_timestep": _at_least(0),
    "loss.kl_weight": _at_least(0),
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.text_encoder_learning_rate": _at_least(0),
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
    "mesh.tensor": (lambda value: value == -1 or value >= 1, "-1 or at least 1"),
    "checkpoint.every_steps": _at_least(1),
    "checkpoint.max_to_keep": _at_least(1),
    "sample.every_steps": _at_least(0),
    "sample.prompts": _texts("texts"),
    "sample.seeds_per_prompt": _at_least(1),
    "sample.num_steps": _at_least(1),
    "sample.guidance_scale": _at_least(0),
    "sample.guidance_rescale": _SHARE,
    "sample.sampler": _one_of("ddim", "ddpm", "euler", "euler_ancestral", "dpmpp_2m"),
    "sample.brightness": _numbers(),
    "sample.spacing": _one_of("trailing", "leading"),
    "sample.start_noise": _one_of("matched", "plain"),
    "sample.params": _one_of("ema", "raw"),
    "validation.every_steps": _at_least(0),
    "validation.num_examples": _at_least(1),
    "validation.timesteps": (
        lambda value: all(type(each) is int and each >= 0 for each in value) and len(set(value)) == len(value),
        "time steps, each once",
    ),
    "probe.every_steps": _at_least(0),
    "probe.prompts": _texts("texts"),
    "probe.seeds_per_prompt": _at_least(1),
}


def validate(config: ConfigDict) -> None:
    """Checks every value's range and the combinations.

    Raises:
        UserError: with the field, its value and what it must be.
    """
    values = dict(flatten(config))
    for path, (is_valid, requirement) in CHECKS.items():
        try:
            is_right = is_valid(values[path])
        except OverflowError:  # an integer beyond all floats
            is_right = False
        if not is_right:
            raise UserError(f"config: {path} = {values[path]!r} must be {requirement}")
    for is_wrong, reason in combinations(values):
        if is_wrong:
            raise UserError(f"config: {reason}")
