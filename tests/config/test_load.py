"""Configurations: what is accepted, what is refused, and that each refusal is one line that helps."""

import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import pytest
from ml_collections import ConfigDict

from offsetjax.config import (
    default_config,
    digest,
    flatten,
    from_json,
    load_config,
    override,
    to_json,
    validate,
)
from offsetjax.config.presets import small_autoencoder, stable_diffusion_1, stable_diffusion_2, stable_diffusion_xl
from offsetjax.errors import UserError
from tests.tiny import tiny_config

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = sorted(file for file in (ROOT / "configs").rglob("*.py") if "def get_config(" in file.read_text())

# For each check, values on the wrong side of what it must hold back.
OUT_OF_RANGE: dict[str, tuple[Any, ...]] = {
    "seed": (-1, 2**32),
    "task": ("classifier", ""),
    "train.steps": (0, 10**400),
    "train.global_batch_size": (0,),
    "train.accumulate_steps": (0,),
    "train.profile_steps": ((3,), (0, 2), (5, 4), (1.0, 2.0)),
    "train.log_every_steps": (0,),
    "train.stall_seconds": (-1,),
    "data.resolution": (0, 7),
    "data.num_workers": (-1,),
    "encode.caption_dropout": (-0.1, 1.1, float("nan")),
    "encode.long_captions": ("cut", ""),
    "model.family": ("sd3", "sd15"),
    "model.from_scratch": (("unet", "scheduler"), (1,), ([],)),
    "model.dtype": ("float16",),
    "model.attention": ("flash", ""),
    "model.remat": ("all",),
    "model.scan_layers": ("sometimes",),
    "model.unet.addition_embed_type": ("text", "image"),
    "model.vae.scaling_factor": (-1.0, float("inf")),
    "noise.offset_strength": (-0.1, float("nan"), float("inf")),
    "noise.kind": ("plain", "multires"),
    "noise.channel_strengths": ((-0.1,), ("a",), (float("nan"),), (10**400,)),
    "noise.probability": (0.0, 1.1),
    "noise.adaptive_scale": (float("nan"),),
    "noise.pyramid_discount": (-0.1, 1.0),
    "noise.pyramid_levels": (-1, 17),
    "noise.spectrum": ((1.0,),),
    "noise.input_perturbation": (-0.1,),
    "noise.reference_resolution": (-1,),
    "noise.data_mean": ((float("inf"),), ("a",)),
    "noise.data_mean_std": ((-0.1,),),
    "schedule.num_train_timesteps": (1,),
    "schedule.beta_start": (0.0, 1.0),
    "schedule.beta_end": (0.0, 1.0),
    "schedule.prediction_type": ("v", "sample"),
    "lora.rank": (-1,),
    "lora.alpha": (-1.0, float("inf")),
    "lora.targets": ((1,), (None,)),
    "lora.text_encoder_targets": ((1,), (None,)),
    "loss.min_snr_gamma": (-1.0,),
    "loss.min_timestep": (-1,),
    "loss.kl_weight": (-1.0,),
    "train.max_skipped_in_a_row": (-1,),
    "train.max_spike": (-1.0, 0.5, 1.0, float("nan")),
    "optimizer.learning_rate": (0.0, -1.0, float("nan"), 1e6),
    "optimizer.text_encoder_learning_rate": (-1.0, float("nan"), 1e6),
    "optimizer.warmup_steps": (-1,),
    "optimizer.decay": ("exponential",),
    "optimizer.b1": (-0.1, 1.0, 1.0 - 1e-9, 1.1),
    "optimizer.b2": (-0.1, 1.0, 1.0 - 1e-9, 1.1),
    "optimizer.eps": (0.0,),
    "optimizer.weight_decay": (-0.1, 1e6),
    "optimizer.max_grad_norm": (0.0, float("inf")),
    "optimizer.ema_decay": (-0.1, 1.0, 1.0 - 1e-9),
    "mesh.data": (0, -2),
    "mesh.tensor": (0, -2),
    "mesh.fsdp": (0, -2),
    "checkpoint.every_steps": (0,),
    "checkpoint.max_to_keep": (0,),
    "sample.every_steps": (-1,),
    "sample.prompts": ((1,), (None,)),
    "sample.seeds_per_prompt": (0,),
    "sample.num_steps": (0,),
    "sample.guidance_scale": (-1.0,),
    "sample.sampler": ("DDIMScheduler", "plms"),
    "sample.guidance_rescale": (-0.1, 1.1),
    "sample.brightness": (("dark",), (float("nan"),)),
    "sample.spacing": ("linspace",),
    "sample.start_noise": ("offset",),
    "sample.params": ("average",),
    "validation.every_steps": (-1,),
    "validation.num_examples": (0,),
    "validation.timesteps": ((-1,), (0.5,), (5, 5), (True,)),
    "probe.every_steps": (-1,),
    "probe.prompts": ((1,),),
    "probe.seeds_per_prompt": (0,),
}


ZERO_SNR = {"schedule.zero_terminal_snr": True, "schedule.prediction_type": "v_prediction"}
SPECTRAL = {"noise.kind": "spectral", "noise.spectrum": ("1 + 1 / (f + 0.1)",)}
ADJUSTED = {"noise.kind": "adjusted", "noise.offset_strength": 0.1}
VALIDATED = {"validation.every_steps": 1, "validation.split": "train[90%:]"}


def _config(path: str, value: Any) -> ConfigDict:
    config = default_config()
    *sections, leaf = path.split(".")
    node = config
    for section in sections:
        node = node[section]
    with node.ignore_type():
        node[leaf] = value
    return config


def _write(folder: pathlib.Path, body: str) -> str:
    file = folder / "my config.py"
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    file.write_text(
        "import math, os\n\nfrom offsetjax.config import default_config\n\n\ndef get_config():\n"
        f"    config = default_config()\n{lines}    return config\n"
    )
    return str(file)


def _refusal(folder: pathlib.Path, body: str, **overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(_write(folder, body), [(key.replace("__", "."), text) for key, text in overrides.items()])
    message = str(caught.value)
    assert message.startswith("config: ")
    assert "\n" not in message
    return message


def test_the_defaults_are_valid() -> None:
    validate(default_config())


@pytest.mark.parametrize("path", OUT_OF_RANGE)
def test_each_check_refuses_what_is_out_of_range(path: str) -> None:
    for value in OUT_OF_RANGE[path]:
        with pytest.raises(UserError, match=re.escape(f"config: {path} = {value!r} must be ")):
            validate(_config(path, value))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train.global_batch_size": 6, "train.accumulate_steps": 4}, ("global_batch_size = 6", "multiple", "4")),
        ({"train.profile_steps": (9, 12), "train.steps": 10}, ("train.profile_steps = (9, 12)", "train.steps = 10")),
        ({"mesh.data": -1, "mesh.fsdp": -1}, ("only one of mesh.data, mesh.fsdp and mesh.tensor",)),
        ({"schedule.beta_start": 0.02, "schedule.beta_end": 0.01}, ("beta_start must be below",)),
        (
            {"optimizer.ema_decay": 0.0, "sample.prompts": ("a cat",)},
            ("sample.params = 'ema'", "sample.params = 'raw'"),
        ),
        ({"optimizer.ema_decay": 0.0, "probe.every_steps": 5}, ("sample.params = 'ema'", "sample.params = 'raw'")),
        ({"task": "autoencoder", "noise.offset_strength": 0.1}, ("noise.offset_strength", "set it back")),
        ({"schedule.num_train_timesteps": 40}, ("sample.num_steps = 50", "at most 40", "trailing")),
        ({"loss.min_timestep": 1000}, ("loss.min_timestep = 1000", "below", "1000")),
        ({"sample.num_steps": 1000, "sample.spacing": "leading"}, ("sample.num_steps = 1000", "at most 999")),
        (
            {"sample.num_steps": 999, "sample.spacing": "leading", "sample.sampler": "dpmpp_2m"},
            ("sample.num_steps = 999", "at most 998"),
        ),
        ({"schedule.zero_terminal_snr": True}, ("zero_terminal_snr", "v_prediction")),
        ({**ZERO_SNR, "sample.spacing": "leading"}, ("zero_terminal_snr", "trailing", "never visits")),
        ({**ZERO_SNR, "loss.min_snr_gamma": 5.0}, ("loss.min_snr_gamma", "no weight")),
        ({**ZERO_SNR, "noise.kind": "adjusted"}, ("adjusted", "zero_terminal_snr", "ψ_t")),
        ({**ADJUSTED, "sample.spacing": "leading"}, ("adjusted", "sample.spacing = 'trailing'")),
        ({"noise.pyramid_discount": 0.3}, ("noise.pyramid_discount cannot apply", "'offset'")),
        ({"noise.spectrum": ("1",)}, ("noise.spectrum cannot apply", "'offset'")),
        ({"noise.kind": "pyramid"}, ("needs noise.pyramid_discount and noise.pyramid_levels",)),
        ({"noise.kind": "pyramid", "noise.pyramid_levels": 6}, ("needs noise.pyramid_discount",)),
        ({"noise.kind": "spectral"}, ("needs noise.spectrum",)),
        ({"noise.kind": "spectral", "noise.spectrum": ("1", "2")}, ("2 formulas", "4 channels")),
        ({**SPECTRAL, "noise.offset_strength": 0.1}, ("noise.offset_strength cannot apply", "'spectral'")),
        ({**SPECTRAL, "noise.probability": 0.5}, ("noise.probability cannot apply", "'spectral'")),
        ({**SPECTRAL, "noise.reference_resolution": 512}, ("noise.reference_resolution cannot apply",)),
        ({**ADJUSTED, "noise.random_strength": True}, ("noise.random_strength cannot apply", "'adjusted'")),
        ({**ADJUSTED, "noise.adaptive_scale": 0.1}, ("noise.adaptive_scale cannot apply", "'adjusted'")),
        ({"noise.random_strength": True}, ("noise.random_strength needs a strength",)),
        ({"noise.channel_strengths": (0.0,) * 4, "noise.random_strength": True}, ("needs a strength",)),
        ({"noise.kind": "pyramid", "noise.pyramid_discount": 0.3, "noise.pyramid_levels": 1}, ("2 and more",)),
        ({**SPECTRAL, "noise.spectrum": ("import os",)}, ("noise.spectrum: 'import os' is no formula",)),
        ({**SPECTRAL, "noise.spectrum": ("-1",)}, ("noise.spectrum: '-1' has values", "powers are finite")),
        ({**SPECTRAL, "noise.spectrum": ("1 / f",)}, ("noise.spectrum: '1 / f' has values",)),
        ({**ZERO_SNR, "noise.calibration": "a.json"}, ("noise.calibration cannot apply", "no offset is needed")),
        ({"sample.num_steps": 300}, ("sample.num_steps = 300", "a rest of 100", "euler")),
        ({"sample.guidance_scale": 1.0, "sample.guidance_rescale": 0.7}, ("sample.guidance_rescale", "guidance")),
        ({"sample.guidance_scale": 1.0, "sample.negative_prompt": "dark"}, ("sample.negative_prompt", "guidance")),
        ({"task": "autoencoder", **ZERO_SNR}, ("schedule.zero_terminal_snr cannot apply",)),
        ({"task": "autoencoder", "sample.brightness": (1.0,)}, ("sample.brightness cannot apply",)),
        ({"noise.probability": 0.25}, ("noise.probability needs a strength",)),
        ({"noise.reference_resolution": 512}, ("noise.reference_resolution needs a strength",)),
        ({"noise.channel_strengths": (0.1, 0.2)}, ("2 values", "4 channels")),
        ({"noise.channel_strengths": (0.1,) * 4, "noise.offset_strength": 0.1}, ("both say how strong",)),
        ({"noise.calibration": "a.json", "noise.offset_strength": 0.1}, ("both say how strong",)),
        ({"noise.offset_strength": 0.1, "noise.adaptive_scale": 0.1}, ("noise.adaptive_scale", "noise.calibration")),
        ({"noise.data_mean": (0.0,) * 4}, ("belong together",)),
        ({"noise.data_mean": (0.0,) * 4, "noise.data_mean_std": (1.0,) * 4}, ("noise.adaptive_scale alone",)),
        ({"noise.offset_strength": 0.1, "noise.random_strength": True, "sample.sampler": "ddpm"}, ("to be normal",)),
        ({"sample.brightness": (1.0,), "sample.sampler": "euler_ancestral"}, ("euler_ancestral", "forgets")),
        ({"validation.every_steps": 100}, ("validation.split", "not trained on")),
        ({**VALIDATED, "validation.timesteps": ()}, ("validation.timesteps is empty",)),
        ({**VALIDATED, "validation.timesteps": (1000,)}, ("validation.timesteps", "1000")),
        ({"probe.every_steps": 100, "probe.prompts": ()}, ("probe.prompts is empty",)),
        ({"model.variant": "fp16"}, ("model.variant cannot apply without model.pretrained",)),
        ({"model.from_scratch": ("vae",)}, ("model.from_scratch cannot apply without model.pretrained",)),
        (
            {"model.text_encoder_2.hidden_size": 64},
            (
                "model.text_encoder_2.hidden_size",
                "only Stable Diffusion XL (model",
            ),
        ),
        (
            {"model.pretrained": "a", "model.family": "sd2", "model.from_scratch": ("text_encoder_2",)},
            ("model.from_scratch has text_encoder_2", "only Stable Diffusion XL (model.family = 'sdxl')"),
        ),
        ({"lora.alpha": 8.0}, ("lora.alpha cannot apply with lora.rank = 0", "set lora.rank")),
        ({"lora.rank": 4, "lora.targets": ()}, ("lora.targets is empty", "to_q")),
        ({"lora.rank": 4, "lora.text_encoder_targets": ("q_proj",)}, ("lora.text_encoder_targets", "are frozen")),
        (
            {"lora.rank": 4, "lora.text_encoder_targets": (), "train.text_encoders": True},
            ("lora.text_encoder_targets is empty", "q_proj"),
        ),
        ({"lora.rank": 4}, ("lora.rank needs a model", "set model.pretrained")),
        (
            {"lora.rank": 4, "model.pretrained": "a", "model.from_scratch": ("unet",)},
            ("lora.rank needs a model", "model.from_scratch"),
        ),
        ({"task": "autoencoder", "lora.rank": 4}, ("lora.rank cannot apply",)),
        ({"task": "autoencoder", "data.cached_latents": True}, ("data.cached_latents cannot apply",)),
        (
            {"task": "autoencoder", "optimizer.text_encoder_learning_rate": 1e-6},
            ("optimizer.text_encoder_learning_rate cannot apply to task = 'autoencoder'",),
        ),
        ({"task": "autoencoder", "train.text_encoders": True}, ("train.text_encoders cannot apply to task",)),
        (
            {"optimizer.text_encoder_learning_rate": 1e-6},
            ("optimizer.text_encoder_learning_rate = 1e-06 cannot apply", "set train.text_encoders = True"),
        ),
        ({"task": "autoencoder", "probe.every_steps": 1}, ("probe.every_steps cannot apply",)),
        ({"task": "autoencoder", "noise.kind": "adjusted"}, ("noise.kind cannot apply",)),
        ({"task": "autoencoder", "encode.caption_dropout": 0.2}, ("encode.caption_dropout cannot apply",)),
        ({"task": "autoencoder", "encode.long_captions": "refuse"}, ("encode.long_captions cannot apply",)),
        ({"task": "autoencoder", "loss.min_timestep": 700}, ("loss.min_timestep cannot apply",)),
        ({"task": "autoencoder", "sample.every_steps": 100}, ("sample.every_steps cannot apply",)),
        ({"task": "autoencoder", "sample.prompts": ("a cat",)}, ("sample.prompts cannot apply",)),
        ({"task": "autoencoder", "model.remat": "blocks"}, ("model.remat cannot apply",)),
        ({"task": "autoencoder", "model.attention": "xla"}, ("model.attention cannot apply",)),
        ({"task": "autoencoder", "model.scan_layers": "always"}, ("model.scan_layers cannot apply",)),
        (
            {"task": "autoencoder", "model.pretrained": "a", "model.from_scratch": ("unet",)},
            ("model.from_scratch cannot apply",),
        ),
        (
            {"task": "autoencoder", "encode.caption_dropout": 0.5, "schedule.beta_end": 0.02},
            ("encode.caption_dropout, schedule.beta_end cannot apply to task = 'autoencoder'; set them back",),
        ),
        ({"loss.kl_weight": 1e-5}, ("loss.kl_weight cannot apply to task = 'diffusion'", "set it back")),
    ],
)
def test_combinations_that_contradict_each_other_are_refused(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    config = default_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError) as caught:
        validate(config)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("preset", [small_autoencoder, stable_diffusion_1, stable_diffusion_2, stable_diffusion_xl])
def test_an_autoencoder_is_trained_by_the_presets_of_whole_models(preset: Callable[[ConfigDict], None]) -> None:
    config = default_config()
    preset(config)
    config.task, config.loss.kl_weight, config.encode.caption_dropout = "autoencoder", 1e-5, 0.0
    validate(config)


def test_no_average_is_needed_where_nothing_is_drawn() -> None:
    """`sample.every_steps` is set by default; without prompts it draws nothing."""
    config = default_config()
    config.optimizer.ema_decay = 0.0
    validate(config)


@pytest.mark.parametrize(("name", "text"), [("a.toml", "steps = [1]"), ("a.yaml", "a: 1"), ("a.json", "{}")])
def test_a_file_of_another_trainer_is_named_as_what_it_is(tmp_path: pathlib.Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=rf"{name} is {name[2:].upper()}; a config is a Python file with get_config"):
        load_config(str(tmp_path / name))


def test_an_autoencoder_of_the_smallest_model_is_accepted() -> None:
    changes = {"task": "autoencoder", "noise__offset_strength": 0.0, "loss__kl_weight": 1e-5}
    validate(tiny_config(**changes))
    validate(tiny_config(**changes, model__pretrained="a", model__from_scratch=("vae",)))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("config.noise.offset_strenght = 0.1", "unknown key 'offset_strenght'; did you mean noise.offset_strength?"),
        ("config.noise['strength'] = 0.1", "unknown key 'strength'; did you mean noise."),
        ("config.train.update(stepz=3)", "unknown key 'stepz'; did you mean train.steps?"),
        ("config.nosie.offset_strength = 0.1", "unknown key 'nosie'; did you mean noise?"),
        ("config.noise_offset = 0.1", "it is called noise.offset_strength here"),
        ("config.train.max_train_steps = 3", "it is called train.steps here"),
        ("config.zzzzzzzz = 1", "unknown key 'zzzzzzzz'; `offsetjax config` lists the fields"),
        ("config.train.steps = 'ten'", "'steps'"),
        ("config.train.steps = 1.5", "'steps'"),
        ("config.train.steps = 0", "train.steps = 0 must be at least 1"),
        ("config = 3", "must return the ConfigDict of default_config()"),
        ("config = type(config)()", "must return the ConfigDict of default_config()"),
        ("x = (", "SyntaxError"),
        # Mistakes in the user's own Python are not taken for keys of ours.
        ("math.floor_", "AttributeError: module 'math' has no attribute 'floor_'"),
        ("os.environ['NOT_SET_ANYWHERE']", "KeyError: 'NOT_SET_ANYWHERE'"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_that_names_it(tmp_path: pathlib.Path, line: str, words: str) -> None:
    assert words in _refusal(tmp_path, line)


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("noise.offset", "0.1", "unknown key 'noise.offset'; did you mean noise.offset_strength?"),
        ("noise_offset", "0.1", "unknown key 'noise_offset'; it is called noise.offset_strength here"),
        ("min_snr_gamma", "5", "it is called loss.min_snr_gamma here"),
        ("train", "3", "unknown key 'train'"),
        ("train.steps", "1e3", "train.steps = '1e3' is not of type int, such as 1000"),
        ("optimizer.learning_rate", "fast", "is not of type float, such as 1e-05"),
        ("data.random_flip", "yes", "data.random_flip = 'yes' is not of type bool, such as True"),
        (
            "sample.prompts",
            "('a cat'",
            "such as 'one text' or '(\"one text\", \"another\")', brackets and quotes closed",
        ),
        ("sample.prompts", "(1, 2)", "is not of type tuple"),
        ("sample.prompts", "None", "is not of type tuple"),
        ("noise.channel_strengths", "a", "is not of type tuple, such as (0.1,)"),
        ("sample.prompts", "{[]: 1}", "is not of type tuple"),
        ("noise.offset_strength", "nan", "noise.offset_strength = nan must be at least 0"),
    ],
)
def test_a_mistake_in_an_override_is_one_line_that_names_it(
    tmp_path: pathlib.Path, key: str, text: str, words: str
) -> None:
    assert words in _refusal(tmp_path, "", **{key.replace(".", "__"): text})


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("seed", "4294967295", 2**32 - 1),
        ("noise.offset_strength", "0.1", 0.1),
        ("noise.offset_strength", "1", 1.0),
        ("data.random_flip", "False", False),
        ("data.random_flip", "true", True),
        ("data.path", "a folder with spaces", "a folder with spaces"),
        ("data.path", "", ""),
        ("sample.prompts", '("a cat", "a dog, running")', ("a cat", "a dog, running")),
        ("sample.prompts", "['a cat']", ("a cat",)),
        ("sample.prompts", "'a cat'", ("a cat",)),
        ("sample.prompts", "a cat", ("a cat",)),
        ("sample.prompts", "a cat, a dog (asleep)", ("a cat, a dog (asleep)",)),
        ("noise.channel_strengths", "0.1, 0.2", (0.1, 0.2)),
        ("sample.prompts", "()", ()),
        ("model.unet.block_out_channels", "(8, 16)", (8, 16)),
    ],
)
def test_an_override_keeps_the_fields_type(key: str, text: str, value: Any) -> None:
    config = default_config()
    override(config, key, text)
    result = dict(flatten(config))[key]
    assert (result, type(result)) == (value, type(value))


@pytest.mark.parametrize("path", ["missing.py", ".", "gs://bucket/config.py", "https://example.com/config.py", ""])
def test_only_local_files_are_run(path: str) -> None:
    with pytest.raises(UserError, match="is not a local file"):
        load_config(path)


def test_a_file_without_get_config_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "empty.py").write_text("def config(): pass\n")
    with pytest.raises(UserError, match=r"empty\.py: no function get_config\(\)"):
        load_config(str(tmp_path / "empty.py"))


def test_json_keeps_every_value_and_its_type() -> None:
    config = default_config()
    config.sample.prompts = ("ein Löwe", "a 'quoted' \"word\"")
    config.noise.offset_strength = 0.1
    back = from_json(to_json(config))
    assert [(path, value, type(value)) for path, value in flatten(back)] == [
        (path, value, type(value)) for path, value in flatten(config)
    ]
    assert back.is_locked


def test_json_of_another_version_is_refused_by_the_field() -> None:
    with pytest.raises(
        UserError, match=r"unknown key 'noise\.offset_strong' in a stored config\.json; did you mean noise"
    ):
        from_json(to_json(default_config()).replace("offset_strength", "offset_strong"))


def test_the_digest_is_the_files_sha256(tmp_path: pathlib.Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")  # the example of FIPS 180-2
    assert digest(str(tmp_path / "abc")) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_there_are_configs() -> None:
    assert CONFIGS


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_config_loads_and_says_how_to_run_it(file: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(str(file))
    assert from_json(to_json(config)) == config
    text = file.read_text()
    assert f"--config={file.relative_to(ROOT)}" in text
    assert "Hardware: " in text


def test_text_encoders_that_a_stored_config_gave_a_rate_were_trained() -> None:
    config = default_config()
    config.train.text_encoders, config.optimizer.text_encoder_learning_rate = True, 1e-5
    stored = json.loads(to_json(config))
    del stored["train"]["text_encoders"]
    assert from_json(json.dumps(stored)).train.text_encoders
    stored["optimizer"]["text_encoder_learning_rate"] = 0.0
    assert not from_json(json.dumps(stored)).train.text_encoders


def test_a_config_that_was_stored_before_a_field_existed_has_its_default() -> None:
    """A work directory of an earlier version resumes: its noise, its samples and its schedule are what they were."""
    config = default_config()
    config.noise.offset_strength = 0.1
    stored = json.loads(to_json(config))
    stored["noise"] = {"offset_strength": 0.1}
    for field in ("sampler", "guidance_rescale", "brightness"):
        del stored["sample"][field]
    del stored["schedule"]["zero_terminal_snr"], stored["validation"], stored["probe"]
    assert from_json(json.dumps(stored)) == config
