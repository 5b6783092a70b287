"""What a config may hold: the range of every value, and the combinations that make sense.

A combination that makes none is refused with the reason, and so is a setting that could not apply: nothing is ignored.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from offsetjax.errors import UserError

Check = tuple[Callable[[Any], bool], str]


def _one_of(*names: str) -> Check:
    return lambda value: value in names, "one of " + ", ".join(names)


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


_PARTS = ("unet", "vae", "text_encoder", "tokenizer")

CHECKS: dict[str, Check] = {
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
    "validation.timesteps": (lambda value: all(isinstance(each, int) and each >= 0 for each in value), "time steps"),
    "probe.every_steps": _at_least(0),
    "probe.prompts": _texts("texts"),
    "probe.seeds_per_prompt": _at_least(1),
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
    for path, (is_valid, requirement) in CHECKS.items():
        if not is_valid(values[path]):
            raise UserError(f"config: {path} = {values[path]!r} must be {requirement}")
    for check in (_training, _schedule, _adjusted, _noise, _noise_extras, _sampling):
        for is_wrong, reason in check(values):
            if is_wrong:
                raise UserError(f"config: {reason}")


Values = Mapping[str, Any]
Wrongs = Iterator[tuple[object, str]]


def _training(values: Values) -> Wrongs:
    batch, parts = values["train.global_batch_size"], values["train.accumulate_steps"]
    yield (
        batch % parts != 0,
        f"train.global_batch_size = {batch} must be a multiple of train.accumulate_steps = {parts}",
    )
    yield (
        values["mesh.data"] == values["mesh.fsdp"] == -1,
        "only one of mesh.data and mesh.fsdp can be -1 (all devices that are left)",
    )
    for path in ("probe.every_steps", "validation.every_steps"):
        yield (
            values["task"] == "autoencoder" and values[path],
            f"{path} cannot apply to task = 'autoencoder'; set it to 0",
        )
    watches = any(values[f"{section}.every_steps"] for section in ("sample", "validation", "probe"))
    yield (
        values["sample.params"] == "ema" and values["optimizer.ema_decay"] == 0 and watches,
        "sample.params = 'ema' needs optimizer.ema_decay above 0; or set sample.params = 'raw'",
    )
    yield (
        values["validation.every_steps"] and not values["validation.split"],
        "validation.every_steps needs validation.split, pictures that are not trained on, such as 'train[95%:]' beside "
        "data.split = 'train[:95%]'",
    )
    steps = values["schedule.num_train_timesteps"]
    yield (
        values["validation.every_steps"] and not values["validation.timesteps"],
        "validation.timesteps is empty",
    )
    beyond = [each for each in values["validation.timesteps"] if each >= steps and values["validation.every_steps"]]
    yield beyond, f"validation.timesteps has {beyond[:1]}, but schedule.num_train_timesteps = {steps}"
    yield values["probe.every_steps"] and not values["probe.prompts"], "probe.prompts is empty"


def _schedule(values: Values) -> Wrongs:
    steps = values["schedule.num_train_timesteps"]
    yield (
        values["loss.min_timestep"] >= steps,
        f"loss.min_timestep = {values['loss.min_timestep']} must be below schedule.num_train_timesteps = {steps}",
    )
    yield (
        values["schedule.beta_start"] >= values["schedule.beta_end"],
        "schedule.beta_start must be below schedule.beta_end",
    )
    # "leading" starts one step late (steps_offset = 1): with as many steps as the schedule it would start beyond it.
    # DPM-Solver++'s grid of that kind has one step more, which is left out.
    late = values["sample.spacing"] == "leading"
    most = steps - late - (late and values["sample.sampler"] == "dpmpp_2m")
    yield (
        values["sample.num_steps"] > most,
        f"sample.num_steps = {values['sample.num_steps']} must be at most {most} with "
        f"sample.spacing = {values['sample.spacing']!r}",
    )
    if not values["schedule.zero_terminal_snr"]:
        return
    yield (
        values["schedule.prediction_type"] == "epsilon",
        "schedule.zero_terminal_snr needs schedule.prediction_type = 'v_prediction': the last step's noise is its "
        "input, so that predicting ε says nothing of the picture",
    )
    yield (
        values["sample.spacing"] == "leading",
        "schedule.zero_terminal_snr needs sample.spacing = 'trailing': leading spacing never visits the last step",
    )
    yield (
        values["loss.min_snr_gamma"] > 0,
        "loss.min_snr_gamma gives the steps near a zero SNR no weight, and they decide on the brightness; set it to 0 "
        "or schedule.zero_terminal_snr to False",
    )
    yield (
        values["noise.kind"] == "adjusted",
        "noise.kind = 'adjusted' has no meaning with schedule.zero_terminal_snr: ψ_t = √(SNR_T / SNR_t) would be 0",
    )


def _adjusted(values: Values) -> Wrongs:
    yield (
        values["noise.kind"] == "adjusted" and values["sample.spacing"] == "leading",
        "noise.kind = 'adjusted' needs sample.spacing = 'trailing': its shift is that of the last step, where leading "
        "spacing does not begin",
    )


def _noise(values: Values) -> Wrongs:
    kind, strengths = values["noise.kind"], values["noise.channel_strengths"]
    noise = {path for path, value in values.items() if path.startswith("noise.") and value not in (0, "", ())}
    has_strength = bool({"noise.offset_strength", "noise.channel_strengths", "noise.calibration"} & noise)
    settings = {
        "noise.pyramid_discount": ("pyramid",),
        "noise.pyramid_levels": ("pyramid",),
        "noise.spectrum": ("spectral",),
        "noise.offset_strength": ("offset", "pyramid", "adjusted"),
        "noise.channel_strengths": ("offset", "pyramid", "adjusted"),
        "noise.random_strength": ("offset", "pyramid"),
        "noise.adaptive_scale": ("offset", "pyramid"),
        "noise.reference_resolution": ("offset", "pyramid", "adjusted"),
    }
    for path, kinds in settings.items():
        yield path in noise and kind not in kinds, f"{path} cannot apply to noise.kind = {kind!r}; set it back"
    yield (
        values["noise.probability"] < 1 and kind not in ("offset", "pyramid"),
        f"noise.probability cannot apply to noise.kind = {kind!r}; set it back to 1.0",
    )
    yield (
        kind == "pyramid" and not {"noise.pyramid_discount", "noise.pyramid_levels"} <= noise,
        "noise.kind = 'pyramid' needs noise.pyramid_discount and noise.pyramid_levels, such as 0.3 and 6",
    )
    yield (
        kind == "spectral" and not {"noise.spectrum", "noise.calibration"} & noise,
        "noise.kind = 'spectral' needs noise.spectrum, such as ('1 + 0.02 / (f + 0.01) ** 2',), or noise.calibration",
    )
    yield (
        {"noise.offset_strength", "noise.channel_strengths"} <= noise,
        "noise.offset_strength and noise.channel_strengths both say how strong the offset is; set one",
    )
    channels = values["model.vae.latent_channels"]
    for path in ("noise.channel_strengths", "noise.data_mean", "noise.data_mean_std"):
        yield (
            len(values[path]) not in (0, channels),
            f"{path} has {len(values[path])} values, but the latents have {channels} channels",
        )
    yield (
        len(values["noise.spectrum"]) not in (0, 1, channels),
        f"noise.spectrum has {len(values['noise.spectrum'])} formulas, but the latents have {channels} channels; give "
        "one, or one for each",
    )
    for path in ("noise.random_strength", "noise.reference_resolution"):
        yield path in noise and not has_strength, f"{path} needs a strength: set noise.offset_strength"
    yield (
        values["noise.probability"] < 1 and not has_strength and "noise.adaptive_scale" not in noise,
        "noise.probability needs a strength: set noise.offset_strength",
    )
    if strengths or "noise.spectrum" in noise:  # as after a calibration; what the file would fill is there
        return
    yield (
        "noise.calibration" in noise and "noise.offset_strength" in noise and "noise.adaptive_scale" not in noise,
        "noise.offset_strength and noise.calibration both say how strong the offset is; set one",
    )


def _noise_extras(values: Values) -> Wrongs:
    is_autoencoder = values["task"] == "autoencoder"
    for path, value in values.items():
        default = {"noise.kind": "offset", "noise.probability": 1.0}.get(path, 0)
        if is_autoencoder and path.startswith("noise.") and value not in (default, "", ()):
            yield True, f"{path} cannot apply to task = 'autoencoder'; set it back"
    yield (
        bool(values["noise.data_mean"]) != bool(values["noise.data_mean_std"]),
        "noise.data_mean and noise.data_mean_std belong together; set both or none",
    )
    yield (
        values["noise.data_mean"] and not values["noise.adaptive_scale"],
        "noise.data_mean is of use to noise.adaptive_scale alone; leave it out",
    )
    yield (
        values["noise.adaptive_scale"] != 0
        and values["sample.start_noise"] == "matched"
        and not (values["noise.calibration"] or values["noise.data_mean"]),
        "noise.adaptive_scale makes the noise depend on a latent's mean, which a matched start must draw from the "
        "data's: set noise.calibration (see `offsetjax calibrate`), or sample.start_noise = 'plain'",
    )


def _sampling(values: Values) -> Wrongs:
    if values["sample.sampler"] not in ("ddpm", "euler_ancestral"):
        return
    sampler = values["sample.sampler"]
    is_mixture = values["noise.random_strength"] or values["noise.probability"] < 1 or values["noise.adaptive_scale"]
    yield (
        is_mixture,
        f"sample.sampler = {sampler!r} injects noise, which has to be normal: with noise.random_strength, "
        "noise.probability or noise.adaptive_scale use ddim, euler or dpmpp_2m",
    )
    yield (
        values["sample.brightness"],
        f"sample.brightness sets the start, which sample.sampler = {sampler!r} forgets; use ddim, euler or dpmpp_2m",
    )
