"""Which values of a config make sense together.

A combination that makes none is refused with the reason, and so is a setting that could not apply: nothing is ignored.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from offsetjax.config.data_rules import data_rules
from offsetjax.config.families import FAMILIES, family_of_values
from offsetjax.config.optimizer_rules import optimizer_rules
from offsetjax.config.registries import TASKS
from offsetjax.config.schema import default as default_of
from offsetjax.config.schema import default_config
from offsetjax.config.settings import flatten
from offsetjax.diffusion.process import PROCESSES, unread_fields
from offsetjax.diffusion.spectrum import formula_spectrum
from offsetjax.errors import one_line

Values = Mapping[str, Any]  # by path
Wrongs = Iterator[tuple[object, str]]  # whether something is wrong, and what


def combinations(values: Values) -> Wrongs:
    """Every rule, for the values of a config by their paths, each of which is in its range."""
    for rules in (
        _training,
        optimizer_rules,
        data_rules,
        _model,
        _schedule,
        _noise,
        _noise_extras,
        _spectrum,
        _sampling,
        _task,
    ):
        yield from rules(values)


def _training(values: Values) -> Wrongs:
    batch, parts = values["train.global_batch_size"], values["train.accumulate_steps"]
    yield (
        batch % parts != 0,
        f"train.global_batch_size = {batch} must be a multiple of train.accumulate_steps = {parts}",
    )
    yield (
        values["train.profile_steps"] and values["train.profile_steps"][1] > values["train.steps"],
        f"train.profile_steps = {values['train.profile_steps']} goes beyond train.steps = {values['train.steps']}",
    )
    yield (
        values["train.roll_back"] and not values["train.max_skipped_in_a_row"],
        "train.roll_back goes back after train.max_skipped_in_a_row steps, which is 0: never; set one of them",
    )
    yield (
        [values[f"mesh.{axis}"] for axis in ("data", "fsdp", "tensor")].count(-1) > 1,
        "only one of mesh.data, mesh.fsdp and mesh.tensor can be -1 (all devices that are left)",
    )
    is_sampled = values["sample.every_steps"] and values["sample.prompts"]
    is_evaluated = is_sampled or values["validation.every_steps"] or values["probe.every_steps"]
    yield (
        values["sample.params"] == "ema" and values["optimizer.ema_decay"] == 0 and is_evaluated,
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


def _model(values: Values) -> Wrongs:
    """Settings of weights that could not apply."""
    yield from _parts(values)
    yield from _text_encoders(values)
    defaults = dict(flatten(default_config()))
    for path in ("model.variant", "model.from_scratch"):
        yield values[path] and not values["model.pretrained"], f"{path} cannot apply without model.pretrained"
    family = family_of_values(values)
    adapted = [path for path in values if path.startswith("lora.") and values[path] != defaults[path]]
    yield (
        adapted and not values["lora.rank"] and not values["lora.pretrained"],
        f"{', '.join(adapted)} cannot apply with lora.rank = 0, which trains the weights themselves; set lora.rank",
    )
    has_adapters = values["lora.rank"] or values["lora.pretrained"]
    yield has_adapters and not values["lora.targets"], "lora.targets is empty; name layers, such as ('to_q', 'to_v')"
    text_targets, learns_text = "lora.text_encoder_targets", values["train.text_encoders"]
    yield (
        has_adapters and learns_text and not values[text_targets],
        f"{text_targets} is empty; name layers, such as ('q_proj', 'v_proj')",
    )
    is_default = values[text_targets] == family.text_encoder_lora_targets  # as a checkpoint's family fills it in
    yield (
        text_targets in adapted and not is_default and not learns_text,
        f"{text_targets} cannot apply: the text encoders are frozen; set train.text_encoders = True",
    )
    is_drawn = not values["model.pretrained"] or family.denoiser in values["model.from_scratch"]
    yield (
        has_adapters and is_drawn and TASKS[values["task"]].denoises,
        f"lora.rank needs a model to adapt: set model.pretrained, with {family.denoiser} not in model.from_scratch, or "
        "lora.rank = 0",
    )


def _text_encoders(values: Values) -> Wrongs:
    """What says how text encoders are trained, where none is."""
    if not TASKS[values["task"]].denoises:  # `_task` says so
        return
    rate, learns = "optimizer.text_encoder_learning_rate", values["train.text_encoders"]
    yield (
        values[rate] and not learns,
        f"{rate} = {values[rate]:g} cannot apply: the text encoders are frozen; set train.text_encoders = True to "
        "train them, or leave it out",
    )
    family = family_of_values(values)
    is_known = values["model.family"] or not values["model.pretrained"]
    yield (
        learns and is_known and not family.encoders,
        f"train.text_encoders cannot apply: {family.title} (model.family = {family.name!r}) has none; set it back",
    )


def _parts(values: Values) -> Wrongs:
    """Settings of parts that the family does not have, or no family."""
    families = [FAMILIES[name] for name in FAMILIES.names]
    known = dict.fromkeys([*(part for family in families for part in family.parts), "tokenizer"])
    scratch = values["model.from_scratch"]
    yield set(scratch) - known.keys(), f"model.from_scratch = {scratch!r} must be made of {', '.join(known)}"
    if values["model.pretrained"] and not values["model.family"]:
        return
    own, defaults = family_of_values(values).parts, dict(flatten(default_config()))

    def those_with(part: str) -> str:
        return " and ".join(
            f"{family.title} (model.family = {family.name!r})" for family in families if part in family.parts
        )

    for part in [part for part in scratch if part not in (*own, "tokenizer")]:
        yield True, f"model.from_scratch has {part}, but only {those_with(part)} has one"
    for part in [part for part in known if part not in own]:
        wrong = [path for path in values if path.startswith(f"model.{part}.") and values[path] != defaults[path]]
        yield wrong, f"{', '.join(wrong)} cannot apply: only {those_with(part)} has a {part}"


def _schedule(values: Values) -> Wrongs:
    steps = values["schedule.num_train_timesteps"]
    yield (
        values["loss.min_timestep"] >= steps,
        f"loss.min_timestep = {values['loss.min_timestep']} must be below schedule.num_train_timesteps = {steps}",
    )
    most = values["loss.max_timestep"]
    yield (
        most and not values["loss.min_timestep"] < most <= steps,
        f"loss.max_timestep = {most} must be above loss.min_timestep = {values['loss.min_timestep']} and at most "
        f"schedule.num_train_timesteps = {steps}",
    )
    density = values["timesteps.density"]
    for path, kind, default in (
        ("timesteps.mean", "logit_normal", 0.0),
        ("timesteps.std", "logit_normal", 1.0),
        ("timesteps.mode_scale", "mode", 0.0),
    ):
        yield (
            values[path] != default and density != kind,
            f"{path} cannot apply to timesteps.density = {density!r}; set it back to {default}",
        )
    yield from PROCESSES[values["schedule.process"]].rules(values)
    schedule = {path.removeprefix("schedule."): value for path, value in values.items() if path.startswith("schedule.")}
    for name in unread_fields(schedule):
        yield (
            schedule[name] != default_of(f"schedule.{name}"),
            f"schedule.{name} = {schedule[name]!r} cannot apply to schedule.process = {schedule['process']!r}, which "
            "does not read it; leave it out",
        )


def _noise(values: Values) -> Wrongs:
    kind, strengths = values["noise.kind"], values["noise.channel_strengths"]
    noise = {path for path, value in values.items() if path.startswith("noise.") and value not in (0, "", ())}
    if not any(strengths):
        noise -= {"noise.channel_strengths"}
    has_strength = {
        "noise.offset_strength",
        "noise.channel_strengths",
        "noise.calibration",
        "noise.adaptive_scale",
    } & noise
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
        kind == "pyramid" and (values["noise.pyramid_discount"] == 0 or values["noise.pyramid_levels"] < 2),
        "noise.kind = 'pyramid' needs noise.pyramid_discount and noise.pyramid_levels of 2 and more, such as 0.3 and 6",
    )
    yield (
        kind == "spectral" and not {"noise.spectrum", "noise.calibration"} & noise,
        "noise.kind = 'spectral' needs noise.spectrum, such as ('1 + 0.02 / (f + 0.01) ** 2',), or noise.calibration",
    )
    yield (
        {"noise.offset_strength", "noise.channel_strengths"} <= noise,
        "noise.offset_strength and noise.channel_strengths both say how strong the offset is; set one",
    )
    yield (
        "noise.anneal" in noise and kind == "offset" and not has_strength,
        "noise.anneal cannot apply to plain noise; set noise.offset_strength, or leave it out",
    )
    channels, _ = family_of_values(values).latents(values)
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
        values["noise.probability"] < 1 and not has_strength,
        "noise.probability needs a strength: set noise.offset_strength",
    )
    if strengths or "noise.spectrum" in noise:  # as after a calibration; what the file would fill is there
        return
    yield (
        "noise.calibration" in noise and "noise.offset_strength" in noise and "noise.adaptive_scale" not in noise,
        "noise.offset_strength and noise.calibration both say how strong the offset is; set one",
    )


def _noise_extras(values: Values) -> Wrongs:
    yield (
        bool(values["noise.data_mean"]) != bool(values["noise.data_mean_std"]),
        "noise.data_mean and noise.data_mean_std belong together; set both or none",
    )
    yield (
        values["noise.data_mean"] and not values["noise.adaptive_scale"],
        "noise.data_mean is of use to noise.adaptive_scale alone; leave it out",
    )
    yield (
        values["noise.adaptive_scale"] and not (values["noise.calibration"] or values["noise.data_mean"]),
        "noise.adaptive_scale makes the noise depend on a latent's mean, which a sampler has to draw from the data's: "
        "set noise.calibration to a file of `offsetjax calibrate`",
    )


def _spectrum(values: Values) -> Wrongs:
    _, downscale = family_of_values(values).latents(values)
    side = max(2, values["data.resolution"] // downscale)
    for formula in values["noise.spectrum"]:
        try:
            formula_spectrum(formula, side, side)
        except ValueError as error:
            yield True, f"noise.spectrum: {one_line(error)}"


def _task(values: Values) -> Wrongs:
    """What the task does not read."""
    yield from TASKS[values["task"]].rules(values)


def _sampling(values: Values) -> Wrongs:
    for path in ("sample.guidance_rescale", "sample.negative_prompt"):
        yield (
            values[path] and values["sample.guidance_scale"] == 1,
            f"{path} cannot apply without guidance, sample.guidance_scale = 1; set it back",
        )
    if values["sample.sampler"] not in ("ddpm", "euler_ancestral"):
        return
    sampler = values["sample.sampler"]
    is_mixture = values["noise.random_strength"] or values["noise.probability"] < 1 or values["noise.adaptive_scale"]
    yield (
        is_mixture,
        f"sample.sampler = {sampler!r} injects noise, which has to be normal: with noise.random_strength, "
        "noise.probability or noise.adaptive_scale use ddim, euler, heun, dpmpp_2m or unipc",
    )
    yield (
        values["sample.brightness"],
        f"sample.brightness sets the start, which sample.sampler = {sampler!r} forgets; use ddim, euler, heun, "
        "dpmpp_2m or unipc",
    )
