"""The base model that the project ships is what `configs/article/base.py` describes."""

import inspect
import json
from pathlib import Path

import diffusers
import jax
import numpy as np
import pytest
from safetensors import safe_open

from offsetjax.article.pictures import BRIGHTNESS_RANGES, PROMPTS, draw
from offsetjax.config import flatten, load_config
from offsetjax.models.encode import to_unit_range
from offsetjax.models.pipeline import build
from offsetjax.models.resolve import resolve
from offsetjax.models.tokenizer import load_tokenizer, tokenize
from offsetjax.models.weights import initial_params

CONFIGS = Path(__file__).parents[2] / "configs" / "article"
PRETRAINED = CONFIGS / "pretrained"


@pytest.fixture(scope="module")
def config():
    return load_config(str(CONFIGS / "base.py"))


def _header():
    with safe_open(PRETRAINED / "unet" / "diffusion_pytorch_model.safetensors", "np") as file:
        return file.metadata()


def test_its_architecture_is_the_config_s(config):
    for part in ("unet", "text_encoder"):
        stored = json.loads((PRETRAINED / part / "config.json").read_text())
        for key, value in config.model[part].items():
            if key not in stored:  # diffusers fills it in
                default = inspect.signature(diffusers.UNet2DConditionModel.__init__).parameters[key].default
                assert build(config).denoiser.torch_config()[key] == default, key
            elif (part, key) != ("unet", "sample_size"):  # the size of its latents stands in data.resolution
                assert stored[key] == (list(value) if isinstance(value, tuple) else value), key


def test_its_autoencoder_is_the_other_config_s():
    stored = json.loads((PRETRAINED / "vae" / "config.json").read_text())
    for key, value in load_config(str(CONFIGS / "autoencoder.py")).model.vae.items():
        if key != "scaling_factor":  # measured
            assert stored[key] == (list(value) if isinstance(value, tuple) else value), key


def test_it_was_trained_as_the_config_says(config):
    header = _header()
    assert float(header["ss_noise_offset"]) == config.noise.offset_strength == 0
    assert header["ss_steps"] == header["ss_max_train_steps"] == str(config.train.steps)
    assert header["ss_seed"] == str(config.seed)
    assert float(header["ss_learning_rate"]) == config.optimizer.learning_rate
    assert header["modelspec.prediction_type"] == "v"
    scheduler = json.loads((PRETRAINED / "scheduler" / "scheduler_config.json").read_text())
    schedule = dict(flatten(config.schedule))
    assert scheduler.get("rescale_betas_zero_snr", False) == schedule.pop("zero_terminal_snr")
    shift = {"process", "conversion", "shift", "shift_rule", "shift_resolution"}  # of a flow, which this is not
    assert schedule["process"] == "variance_preserving"
    assert all(scheduler[key] == value for key, value in schedule.items() if key not in shift)


def test_all_of_it_is_float16_and_small():
    files = [*PRETRAINED.rglob("*.safetensors")]
    assert len(files) == 3
    assert sum(file.stat().st_size for file in files) < 8e6
    for file in files:
        with safe_open(file, "np") as tensors:
            assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F16"}  # noqa: SIM118


def test_its_weights_fit_and_keep_brightness():
    config = resolve(load_config(str(CONFIGS / "fine_tune.py")))
    pipeline = build(config)
    parts = ("unet", "text_encoder", "vae")
    params = {part: initial_params(config.model, config.seed, part, pipeline.parts[part]) for part in parts}
    rng = np.random.default_rng(7)
    pictures = np.stack([draw(p, b, rng) for p in PROMPTS for b in np.linspace(*BRIGHTNESS_RANGES[p], 4)])
    mean, _ = jax.jit(pipeline.autoencoder.encode)(params["vae"], to_unit_range(pictures))
    redrawn = np.clip(np.asarray(jax.jit(pipeline.autoencoder.decode)(params["vae"], mean)) / 2 + 0.5, 0, 1)
    originals = pictures.transpose(0, 3, 1, 2) / 255
    assert np.abs(redrawn.mean((1, 2, 3)) - originals.mean((1, 2, 3))).max() < 0.03
    assert np.sqrt(np.square(redrawn - originals).mean()) < 0.03
    assert np.asarray(mean).std() * pipeline.autoencoder.config["scaling_factor"] == pytest.approx(1, abs=0.2)


def test_its_tokenizer_tells_the_prompts_apart():
    tokenizer = load_tokenizer(PRETRAINED / "tokenizer")
    ids = np.concatenate([tokenize([tokenizer], caption).input_ids for caption in ("", *PROMPTS)])
    assert len(np.unique(ids, axis=0)) == 1 + len(PROMPTS)
    assert ids.shape[1] == load_config(str(CONFIGS / "base.py")).model.text_encoder.max_position_embeddings
