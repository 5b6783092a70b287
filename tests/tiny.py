"""The smallest model and data set that train: seconds on two CPU cores, for whatever test needs a real run."""

import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from offsetjax.config import default_config
from offsetjax.data.build import build
from offsetjax.models.pipeline import Pipeline
from offsetjax.sampling.sample import sampling_noise, start_noise
from offsetjax.sampling.size import drawn_size
from offsetjax.train import train
from offsetjax.training.step import Update, make_update
from tests.compilation import quick_compilation as quick_compilation

CAPTIONS = ("a black square", "a white square", "a red boat", "a green hill")
RESOLUTION = 16


def tiny_config(data_path: pathlib.Path | str = "", **changes: Any) -> ConfigDict:
    """A diffusion model of 16 px pictures and 8x8 latents, all of its parts drawn at random.

    Args:
        changes: fields to set, by path with `__` for the dot: `train__steps=3`.
    """
    config = default_config()
    config.data.path, config.data.resolution = str(data_path), RESOLUTION
    config.train.update(steps=4, global_batch_size=8, log_every_steps=1)
    config.model.dtype = "float32"
    config.model.unet.update(
        sample_size=8,
        down_block_types=("DownBlock2D",),  # captions are read in the middle block: each further reader
        up_block_types=("UpBlock2D",),  # has 26 arrays more to compile an update for
        block_out_channels=(16,),
        layers_per_block=1,
        attention_head_dim=(2,),
        cross_attention_dim=16,
        norm_num_groups=4,
    )
    config.model.vae.update(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=RESOLUTION,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    config.model.text_encoder.update(
        vocab_size=600,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=16,
    )
    config.noise.offset_strength = 0.1
    config.optimizer.update(learning_rate=1e-3, warmup_steps=1, ema_decay=0.9)
    config.checkpoint.every_steps = 2
    config.sample.update(every_steps=0, num_steps=2, seeds_per_prompt=1, guidance_scale=1.0)
    config.update_from_flattened_dict({path.replace("__", "."): value for path, value in changes.items()})
    return config


def update_of(config: ConfigDict) -> Update:
    """How a config's training changes its state."""
    return make_update(config.optimizer, config.train, config.model)


def start_of(pipeline: Pipeline, config: ConfigDict, keys: jax.Array, step: Any = None) -> jax.Array:
    """The latents that a config's pictures start from, one for each key, for parameters of a step."""
    noise = sampling_noise(pipeline.noising, config.sample.start_noise, step)
    return start_noise(noise, pipeline.latent_shape(*drawn_size(config.sample, config.data.resolution)), keys)


def build_data(folder: pathlib.Path, count: int = 16, seed: int = 0) -> pathlib.Path:
    """A data set of `count` captioned pictures, each of one random colour and a little noise; returns its path."""
    rng = np.random.default_rng(seed)
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    lines = []
    for number in range(count):
        colour = rng.integers(0, 256, 3) + rng.normal(0.0, 8.0, (RESOLUTION, RESOLUTION, 3))
        Image.fromarray(np.clip(colour, 0, 255).astype(np.uint8)).save(pictures / f"{number:03}.png")
        lines.append(json.dumps({"file_name": f"{number:03}.png", "text": CAPTIONS[number % len(CAPTIONS)]}))
    (pictures / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    build(pictures, folder / "data")
    return folder / "data"


def run_config(data_path: pathlib.Path | str, **changes: Any) -> ConfigDict:
    """The config of `trained_workdir`: 6 steps on a mesh of 2 x 4, a checkpoint every 2, pictures every 3."""
    config = tiny_config(data_path, train__steps=6, mesh__data=2, mesh__fsdp=4, checkpoint__every_steps=2)
    config.sample.update(every_steps=3, prompts=CAPTIONS[:2])
    config.update_from_flattened_dict({path.replace("__", "."): value for path, value in changes.items()})
    return config


@functools.cache
def data_path(base: pathlib.Path) -> pathlib.Path:
    """One data set for all tests of a session."""
    return build_data(base / "tiny data")


@functools.cache
def trained_workdir(base: pathlib.Path) -> pathlib.Path:
    """One finished training for all tests of a session; they must leave it as it is."""
    workdir = base / "tiny run"
    with quick_compilation(base):
        train(run_config(data_path(base)), workdir)
    return workdir
