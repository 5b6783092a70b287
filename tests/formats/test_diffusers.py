"""What PyTorch wrote comes back bit for bit; what cannot be used is refused by name."""

import json
import pathlib
import shutil
from typing import Any

import diffusers
import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from etils import epath
from ml_collections import ConfigDict

from offsetjax import checkpoint
from offsetjax.config import default_config
from offsetjax.errors import UserError
from offsetjax.export import export
from offsetjax.formats import diffusers as files
from offsetjax.models.pipeline import build, load_params, resolve
from offsetjax.run import open_run
from offsetjax.step import init_state
from tests import torch_models

PARTS = ("unet", "vae", "text_encoder")


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


def tensors_of(directory: pathlib.Path, part: str) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(directory / part / files.WEIGHTS[part])


def change(file: pathlib.Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def load(directory: pathlib.Path, part: str) -> None:
    config = resolve(config_for(directory))
    load_params(directory, part, getattr(build(config), part))


@pytest.mark.parametrize("changes", [{}, {"torch_dtype": torch.float16}], ids=["float32", "float16"])
def test_a_pipeline_goes_through_a_training_of_no_steps_unchanged(
    changes: dict, saved: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Import → frozen parts and checkpoint of the work directory → export: every bit of every tensor."""
    model = saved
    if changes:
        model = tmp_path / "half"
        diffusers.StableDiffusionPipeline.from_pretrained(saved, **changes).save_pretrained(model)
    workdir = epath.Path(tmp_path / "workdir")
    run = open_run(config_for(model), workdir, source=None)
    state = init_state(load_params(model, "unet", run.pipeline.unet), run.config)
    with checkpoint.open_checkpoints(workdir) as manager:
        checkpoint.save(manager, 0, jax.device_put(state), {"next_batch": 0})
    dtype = "float16" if changes else "float32"
    export(workdir, tmp_path / "out", dtype=dtype)

    for part in PARTS:
        before, after = tensors_of(model, part), tensors_of(tmp_path / "out", part)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert after[name].dtype == tensor.dtype == dtype
            np.testing.assert_array_equal(after[name].view(np.uint8), tensor.view(np.uint8), err_msg=name)
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    once = diffusers.StableDiffusionPipeline.from_pretrained(model)
    assert type(again.tokenizer) is transformers.CLIPTokenizer
    assert again.tokenizer.get_vocab() == once.tokenizer.get_vocab()
    assert again.tokenizer(torch_models.CAPTIONS).input_ids == once.tokenizer(torch_models.CAPTIONS).input_ids
    for part in ("unet", "vae"):
        theirs, ours = dict(getattr(once, part).config), dict(getattr(again, part).config)
        differing = {key for key in theirs if theirs[key] != ours.get(key) and not key.startswith("_")}
        assert differing <= {"force_upcast"}  # ours computes in float32, and may stay there
    for key in ("beta_start", "beta_end", "beta_schedule", "prediction_type", "num_train_timesteps"):
        assert again.scheduler.config[key] == once.scheduler.config[key]


def test_missing_extra_and_misshapen_tensors_are_named(copy: pathlib.Path) -> None:
    file = copy / "unet" / files.WEIGHTS["unet"]
    tensors = tensors_of(copy, "unet")
    tensors.pop("conv_in.bias")
    tensors["conv_new.weight"] = np.zeros((2, 2), np.float32)
    tensors["time_embedding.linear_1.weight"] = np.zeros((64, 15), np.float32)
    tensors["conv_out.weight"] = np.zeros((5, 16, 3, 3), np.float32)
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(UserError) as caught:
        load(copy, "unet")
    message = str(caught.value)
    assert message.startswith(f"model.pretrained: {copy}/unet: ") and "\n" not in message
    assert "conv_in.bias is missing" in message
    assert "conv_new.weight is not part of the model" in message
    assert "time_embedding.linear_1.weight has shape (64, 15), not (64, 16)" in message
    assert "conv_out.weight has shape (5, 16, 3, 3), not (4, 16, 3, 3)" in message


def test_many_problems_are_counted(copy: pathlib.Path) -> None:
    safetensors.numpy.save_file({"a": np.zeros(1, np.float32)}, copy / "vae" / files.WEIGHTS["vae"])
    with pytest.raises(UserError, match=r"is missing and \d+ more; is it the checkpoint of another model\?"):
        load(copy, "vae")


@pytest.mark.parametrize("keep", [0, 5, 1000, -10])
def test_a_truncated_file_is_damaged(keep: int, copy: pathlib.Path) -> None:
    file = copy / "unet" / files.WEIGHTS["unet"]
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"diffusion_pytorch_model\.safetensors is damaged .*; fetch it again"):
        load(copy, "unet")


def test_a_pickle_is_not_opened(copy: pathlib.Path) -> None:
    file = copy / "text_encoder" / files.WEIGHTS["text_encoder"]
    file.rename(file.with_name("pytorch_model.bin"))
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle, .*convert it to safetensors"):
        load(copy, "text_encoder")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("unet/config.json", None, r"unet/config\.json is missing"),
        ("vae/config.json", "{", r"vae/config\.json is not JSON"),
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
        ("unet", {"addition_embed_type": "text_time"}),  # SDXL
        ("unet", {"transformer_layers_per_block": [1, 2]}),
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


def test_names_of_before_2023_are_understood(copy: pathlib.Path) -> None:
    """Old autoencoders name their attention otherwise, as 1x1 convolutions; old text encoders hold a buffer."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    before = {}
    for name, tensor in tensors_of(copy, "vae").items():
        for new, former in old.items():
            if f".attentions.0.{new}." in name:
                name, tensor = name.replace(new, former), tensor[..., None, None] if tensor.ndim == 2 else tensor
        before[name] = np.ascontiguousarray(tensor)
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in before

    config = resolve(config_for(copy))
    vae, text_encoder = build(config).vae, build(config).text_encoder
    expected = {part: load_params(copy, part, model) for part, model in (("vae", vae), ("text_encoder", text_encoder))}
    text = tensors_of(copy, "text_encoder") | {"text_model.embeddings.position_ids": np.arange(12)[None]}
    safetensors.numpy.save_file(before, copy / "vae" / files.WEIGHTS["vae"])
    safetensors.numpy.save_file(text, copy / "text_encoder" / files.WEIGHTS["text_encoder"])
    for part, model in (("vae", vae), ("text_encoder", text_encoder)):
        jax.tree.map(np.testing.assert_array_equal, load_params(copy, part, model), expected[part])
