"""Models as large as real ones, written in seconds: their weights repeat a million random numbers."""

import itertools
import pathlib
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from offsetjax.config import default_config, presets
from offsetjax.diffusion.process import make_process
from offsetjax.formats import diffusers as files
from offsetjax.formats.names import torch_tensors
from offsetjax.formats.tensors import Tensor
from offsetjax.models.frozen import write_tokenizers
from offsetjax.models.pipeline import build
from offsetjax.models.tokenizer import train_tokenizer
from offsetjax.models.weights import abstract_params
from offsetjax.storage import checkpoint
from tests import tiny
from tests.processes import most_growth
from tests.untrained import begin

MB = 1_000_000


# What a single file does not say has the values that all of the family have.
_SAID = {
    "block_out_channels": (32, 32),
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}


def wide_config() -> ConfigDict:
    """The tiny model with a denoiser of 50 M parameters, 200 MB."""
    config = tiny.tiny_config()
    config.model.vae.update(_SAID)
    config.model.text_encoder.num_attention_heads = 1
    config.model.unet.update(
        norm_num_groups=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(192, 480),
        attention_head_dim=(8, 8),
        transformer_layers_per_block=(1, 1),
    )
    return config


def family_config(preset: str, **settings: Any) -> ConfigDict:
    """A family's denoiser with other parts that are small."""
    small, config = tiny.tiny_config().model, tiny.tiny_config()
    getattr(presets, preset)(config, **settings)
    config.model.vae.update({**small.vae, **_SAID, "scaling_factor": config.model.vae.scaling_factor})
    for part in ("text_encoder", "text_encoder_2"):
        own = config.model[part]
        kept = {key: own[key] for key in ("hidden_size", "num_attention_heads", "hidden_act")}
        own.update({**small.text_encoder, **kept, "projection_dim": own.hidden_size})
    return config


def write_model(directory: pathlib.Path, config: ConfigDict, dtype: str = "float32") -> None:
    """A diffusers directory of the config's architecture."""
    block = 0.02 * np.random.default_rng(0).standard_normal(1 << 20, np.float32)
    counter = itertools.count()

    def random(like: jax.ShapeDtypeStruct) -> Tensor:
        start, shape = next(counter), like.shape
        return Tensor(shape, np.dtype(np.float32), lambda index: np.resize(np.roll(block, start), shape)[(*index, ...)])

    pipeline = build(config)
    for part in pipeline.needed:
        model = pipeline.parts[part]
        tensors = torch_tensors(jax.tree.map(random, abstract_params(model)))
        files.write_part(directory, part, model.torch_config(), tensors, dtype=dtype)
    text = config.model.text_encoder
    tokenizer = train_tokenizer(tiny.CAPTIONS, text.vocab_size, text.max_position_embeddings)
    write_tokenizers(directory, pipeline.family, dict.fromkeys(pipeline.family.encoders, tokenizer))
    scheduler = files.scheduler_config(make_process(config.schedule).scheduler("ddim", "trailing"))
    files.write_scheduler(directory, scheduler)
    described = pipeline.family.files
    files.write_index(directory, described.pipeline, scheduler["_class_name"], described.index(pipeline.settings))


def run_config(model: pathlib.Path, **changes: Any) -> ConfigDict:
    """The config of a training that begins with a model of `write_model`."""
    config = default_config()
    config.model.pretrained, config.model.dtype = str(model), "float32"
    config.data.resolution = tiny.RESOLUTION
    config.optimizer.ema_decay, config.sample.params, config.sample.every_steps = 0.0, "raw", 0
    config.update_from_flattened_dict({path.replace("__", "."): value for path, value in changes.items()})
    return config


def import_model(config: ConfigDict, workdir: pathlib.Path) -> tuple[int, int]:
    """Begins a run and saves it: the bytes of what it trains, and the most memory that it took until it was there."""
    (_, params), growth = most_growth(lambda: begin(config, workdir))
    with checkpoint.open_checkpoints(workdir) as manager:
        checkpoint.save(manager, 0, {"params": params}, {"next_batch": 0})
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params)), growth
