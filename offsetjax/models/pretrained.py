"""A model that no work directory holds, for sampling: an exported one, or one that was never trained here."""

import re
from functools import partial

import jax
from etils import epath
from jaxtyping import PyTree
from ml_collections import ConfigDict

from offsetjax.config import default_config, validate
from offsetjax.errors import UserError
from offsetjax.formats.pretrained import Pretrained
from offsetjax.json_text import parse_object
from offsetjax.models.family import family_of, open_checkpoint
from offsetjax.models.initial import (
    abstract_trained,
    adopt_lora,
    initial_trained,
    part_tensors,
    pretrained_tokenizers,
)
from offsetjax.models.pipeline import Pipeline, build, frozen_parts, network_parts
from offsetjax.models.resolve import resolve
from offsetjax.models.weights import load, stored_dtype
from offsetjax.models.workdir import Trained, load_trained, read_config
from offsetjax.parallel import sharding


def load_model(path: epath.PathLike, *, variant: str = "", lora: str = "") -> Trained:
    """Opens a work directory, a diffusers directory or a single file, sharded over all devices.

    The noise and the size of the training are read from what an export says of them; of an untouched model the noise
    is plain, and the size its own.

    Args:
        variant: of a diffusers directory's weights, such as fp16.
        lora: a LoRA file to draw with; not for a work directory.

    Raises:
        UserError: it is none of these, or a part of it cannot be read.
    """
    if _is_workdir(path):
        if variant or lora:
            raise UserError(f"sample: {path} is a work directory, to which --variant and --lora cannot apply")
        return load_trained(path)
    config, pipeline, tensors, step = _open(path, variant, lora)
    mesh = sharding.mesh_of(data=1, fsdp=jax.device_count())
    place = partial(sharding.shardings, mesh, pipeline.sharding)
    weights = {}
    for part, tree in tensors.items():
        weights[part] = load(tree, place(tree), stored_dtype(pipeline, part))
    frozen = {part: weights.pop(part) for part in frozen_parts(config)}
    if lora:
        weights = initial_trained(config, pipeline, place(abstract_trained(config, pipeline)))
    return Trained(config, pipeline, weights, frozen, step, "raw", mesh)


def check_model(path: epath.PathLike) -> None:
    """Raises the UserErrors of `load_model`, as far as the headers of files tell."""
    if _is_workdir(path):
        read_config(path)
    else:
        _open(path)


def _is_workdir(path: epath.PathLike) -> bool:
    return all((epath.Path(path) / name).exists() for name in ("config.json", "checkpoints"))


def _open(
    path: epath.PathLike, variant: str = "", lora: str = ""
) -> tuple[ConfigDict, Pipeline, dict[str, PyTree], int]:
    """The config of a model, its parts, their tensors, which are not read yet, and its step, as `_describe` says."""
    pretrained = open_checkpoint(path, variant)
    config = default_config()
    config.model.pretrained, config.model.variant = str(path), variant
    # bfloat16 is what accelerators are quick at, and what CPUs are slow at.
    config.model.dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    config.optimizer.ema_decay, config.sample.params = 0.0, "raw"
    config.lora.pretrained = lora
    config = resolve(config)
    # Adapters of text encoders belong to what is trained; a LoRA without them adds none that change anything.
    config.train.text_encoders = bool(lora and family_of(config).encoders)
    adopt_lora(config)
    pipeline = build(config, pretrained_tokenizers(config))
    step, parts = _describe(config, pipeline, pretrained), network_parts(config)
    return config, pipeline, {part: part_tensors(pretrained, part, pipeline.parts[part]) for part in parts}, step


def _describe(config: ConfigDict, pipeline: Pipeline, pretrained: Pretrained) -> int:
    """Sets the noise and the size of the training, as far as the model's header tells; returns its step.

    That is 0 but where the noise depends on it.
    """
    header = pretrained.metadata()
    size = re.fullmatch(r"(\d{1,5})x\d+", header.get("modelspec.resolution", ""))
    own = pipeline.denoiser.config["sample_size"] * pipeline.autoencoder.downscale
    config.data.resolution = int(size[1]) if size and "offsetjax.noise" in header else own
    try:
        noise = parse_object(header.get("offsetjax.noise", "{}"))
        for key in noise.keys() & config.noise.keys():
            with config.noise.ignore_type():
                config.noise[key] = tuple(noise[key]) if isinstance(noise[key], list) else noise[key]
        if config.noise.anneal:
            config.train.steps, step = int(header["ss_max_train_steps"]), int(header["ss_steps"])
        else:
            step = 0
        validate(config)
        return step
    except (UserError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"sample: {pretrained.path}: what its header says of its noise cannot be read ({error}); export it again"
        ) from error
