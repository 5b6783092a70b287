"""A config takes the family, the architecture and the schedule of a diffusers directory, or is refused."""

import json
import pathlib
import shutil
from typing import Any

import pytest
from ml_collections import ConfigDict

from offsetjax.config import default_config
from offsetjax.errors import UserError
from offsetjax.models.resolve import resolve
from tests import torch_models


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("saved")
    torch_models.save_pipeline(directory)
    return directory


@pytest.fixture
def copy(saved: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(saved, tmp_path / "model"))


def config_for(directory: pathlib.Path) -> ConfigDict:
    config = default_config()
    config.model.pretrained = str(directory)
    config.data.resolution = 16
    config.optimizer.ema_decay, config.sample.params = 0.0, "raw"
    return config


def change(file: pathlib.Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("unet/config.json", None, r"unet/config\.json is missing"),
        ("vae/config.json", "{", r"vae/config\.json is no configuration"),
        ("scheduler/scheduler_config.json", None, r"scheduler_config\.json is missing"),
    ],
)
def test_a_missing_or_broken_config_is_named(file: str, text: str | None, message: str, copy: pathlib.Path) -> None:
    (copy / file).unlink()
    if text is not None:
        (copy / file).write_text(text)
    with pytest.raises(UserError, match=message):
        resolve(config_for(copy))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.unet.norm_num_groups", 16),
        ("model.unet.block_out_channels", (16, 64)),
        ("model.vae.latent_channels", 8),
        ("model.text_encoder.hidden_act", "gelu"),
        ("schedule.prediction_type", "v_prediction"),
    ],
)
def test_a_setting_that_contradicts_the_checkpoint_is_refused(path: str, value: Any, saved: pathlib.Path) -> None:
    config = config_for(saved)
    *sections, key = path.split(".")
    node = config
    for section in sections:
        node = node[section]
    with node.ignore_type():
        node[key] = value
    with pytest.raises(UserError, match=rf"config: {path} = .*, but .* has .*from_scratch"):
        resolve(config)


@pytest.mark.parametrize(
    ("part", "setting"),
    [
        ("unet", {"class_embed_type": "projection"}),
        ("unet", {"time_cond_proj_dim": 256}),
        ("unet", {"num_attention_heads": [2, 4]}),
        ("unet", {"center_input_sample": True}),
        ("vae", {"shift_factor": 0.1}),
        ("vae", {"latents_mean": [0.0, 0.1, 0.2, 0.3]}),
        ("scheduler", {"beta_schedule": "linear"}),
        ("scheduler", {"prediction_type": "sample"}),
    ],
)
def test_other_families_are_refused(part: str, setting: dict, copy: pathlib.Path) -> None:
    change(copy / part / ("scheduler_config.json" if part == "scheduler" else "config.json"), **setting)
    with pytest.raises(UserError, match=rf"{next(iter(setting))} = .*(not supported|must be)"):
        resolve(config_for(copy))


def test_the_schedule_and_the_architecture_are_those_of_the_checkpoint(copy: pathlib.Path) -> None:
    settings = {"prediction_type": "v_prediction", "beta_end": 0.02, "num_train_timesteps": 500}
    change(copy / "scheduler" / "scheduler_config.json", **settings)
    config = resolve(config_for(copy))
    assert {key: config.schedule[key] for key in settings} == settings
    assert config.model.unet.block_out_channels == (16, 32)
    assert config.model.unet.attention_head_dim == (2, 4)
    assert config.model.text_encoder.hidden_size == 24
    assert not config.schedule.zero_terminal_snr
    change(copy / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True)
    assert resolve(config_for(copy)).schedule.zero_terminal_snr
