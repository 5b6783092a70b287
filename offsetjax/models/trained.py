"""A finished model, for sampling and export: from a work directory, a diffusers directory or a single file.

Its config is read first (`resolve.py`, or the run's own), then its weights (`weights.py`).
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from offsetjax.config import config_at, default_config, from_json, to_json, validate
from offsetjax.diffusion.flow import stored_scheduler, stored_shifts
from offsetjax.errors import UserError
from offsetjax.files import write_whole
from offsetjax.formats.names import torch_tensors
from offsetjax.formats.safetensors import read_metadata
from offsetjax.formats.tensors import Tensor
from offsetjax.json_text import parse_object
from offsetjax.models.family import family_of, open_checkpoint
from offsetjax.models.frozen import frozen_tensors, load_frozen, read_tokenizers, stored_dtype
from offsetjax.models.lora import merged_tensors
from offsetjax.models.pipeline import Pipeline, adapter_scale, build, grid_shift, noising_of
from offsetjax.models.resolve import adopt_lora, resolve
from offsetjax.models.task import task_of
from offsetjax.models.weights import abstract_trained, initial_trained, load, part_tensors, pretrained_tokenizers
from offsetjax.parallel import sharding
from offsetjax.parallel.finite import all_finite
from offsetjax.storage import arrays, checkpoint, digests
from offsetjax.storage.retry import retried

_FIELD = {"raw": "params", "ema": "ema_params"}


@dataclass(frozen=True)
class Trained:
    """A model that can be sampled; `params` are those of the trained parts, raw or averaged, by part."""

    config: ConfigDict
    pipeline: Pipeline
    params: Mapping[str, PyTree]
    frozen: Mapping[str, PyTree]
    step: int
    which: str
    mesh: Mesh


def load_model(path: epath.PathLike, *, variant: str = "", lora: str = "") -> Trained:
    """Opens a work directory, a diffusers directory or a single file, sharded over all devices.

    The noise and the size of the training are read from what an export says of them, of a LoRA before its base; of an
    untouched model the noise is plain, and the size its own.

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
    config, pipeline, tensors, step = _open_pretrained(path, variant, lora)
    mesh = sharding.mesh_of(data=1, fsdp=jax.device_count())
    place = partial(sharding.shardings, mesh, pipeline.sharding)
    weights = {}
    for part, tree in tensors.items():
        weights[part] = load(tree, place(tree), stored_dtype(pipeline, part))
    frozen = {part: weights.pop(part) for part in pipeline.frozen}
    if lora:
        shardings = place(abstract_trained(pipeline, config.lora))
        weights = initial_trained(pipeline, config.model, config.lora, config.seed, shardings)
    return Trained(config, pipeline, weights, frozen, step, "raw", mesh)


def check_model(path: epath.PathLike) -> None:
    """Raises the UserErrors of `load_model`, as far as the headers of files say."""
    if _is_workdir(path):
        read_config(path)
    else:
        _open_pretrained(path)


def _is_workdir(path: epath.PathLike) -> bool:
    return all((epath.Path(path) / name).exists() for name in ("config.json", "checkpoints"))


def read_config(workdir: epath.PathLike) -> ConfigDict:
    """The resolved config of a work directory.

    Raises:
        UserError: it is none, or its config.json is damaged.
    """
    file = epath.Path(workdir) / "config.json"
    if not file.exists():
        raise UserError(f"workdir: {workdir} has no config.json; give the --workdir of a training")
    try:
        text = retried(file.read_text, f"workdir: {file}")
        digests.check_json(parse_object(text), f"workdir: {file}")
        return from_json(text)
    except ValueError as error:
        raise UserError(f"workdir: {file} is no config ({error}); restore it from a copy") from error


def write_config(workdir: epath.PathLike, config: ConfigDict) -> None:
    """Writes config.json, with its own digest."""
    stored = digests.signed(parse_object(to_json(config)))
    write_whole(epath.Path(workdir) / "config.json", json.dumps(stored, indent=2) + "\n")


def load_trained(workdir: epath.PathLike, step: int | None = None, which: str | None = None) -> Trained:
    """Reads one checkpoint, sharded over all devices; of its state, no more than what is asked for.

    Args:
        step: None is the newest.
        which: "ema" or "raw"; None is the config's `sample.params`, or raw where no average was kept.

    Raises:
        UserError: no work directory, no such step, an average that was not kept, or weights that are not finite.
    """
    config, tokenizers, which = _open_workdir(workdir, which)
    mesh = sharding.mesh_of(data=1, fsdp=jax.device_count())
    with checkpoint.open_checkpoints(workdir) as manager:
        step = checkpoint.existing_step(manager, step)
        config = config_at(config, step)
        pipeline = build(config, tokenizers)
        place = partial(sharding.shardings, mesh, pipeline.sharding)
        like = abstract_trained(pipeline, config.lora)
        params = checkpoint.restore_part(manager, _FIELD[which], checkpoint.abstract(like, place(like)), step)
    if not jax.jit(partial(all_finite, mesh=mesh, rules=pipeline.sharding))(params):
        raise UserError(
            f"workdir: {workdir}, step {step}: {_not_finite(params)} of the {which} weights has values that are not "
            "finite; give other --params or an earlier --step"
        )
    frozen = load_frozen(epath.Path(workdir) / "frozen", pipeline, place)
    return Trained(config, pipeline, params, frozen, step, which, mesh)


def _not_finite(params: PyTree) -> str:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = [path for path, leaf in leaves if not jnp.isfinite(leaf).all()]
    return jax.tree_util.keystr(paths[0], simple=True, separator="/")


@dataclass(frozen=True)
class Stored:
    """A trained model for export: `params` are lazy tensors."""

    config: ConfigDict
    pipeline: Pipeline
    params: Mapping[str, PyTree]
    frozen: epath.Path
    step: int
    which: str

    def part(self, part: str) -> dict[str, Tensor]:
        """A part as it draws, by PyTorch's names: adapters are merged into their base."""
        if part in self.params and not self.config.lora.rank:
            return torch_tensors(self.params[part])
        tensors = frozen_tensors(self.frozen, part, self.pipeline.parts[part])
        if part not in self.params:
            return tensors
        return merged_tensors(tensors, self.adapters(part), adapter_scale(self.config.lora))

    def adapters(self, part: str) -> PyTree:
        """The adapters of a part, on the host."""
        return jax.tree.map(lambda tensor: tensor(), self.params[part])


def open_stored(workdir: epath.PathLike, step: int | None = None, which: str | None = None) -> Stored:
    """What `load_trained` gives, without reading the weights.

    Raises:
        UserError: as for `load_trained`; what is damaged is found when it is read.
    """
    config, tokenizers, which = _open_workdir(workdir, which)
    with checkpoint.open_checkpoints(workdir) as manager:
        step = checkpoint.existing_step(manager, step)
        config = config_at(config, step)
        pipeline = build(config, tokenizers)
        params = arrays.open_part(manager, _FIELD[which], abstract_trained(pipeline, config.lora), step)
    return Stored(config, pipeline, params, epath.Path(workdir) / "frozen", step, which)


def _open_workdir(workdir: epath.PathLike, which: str | None) -> tuple[ConfigDict, dict[str, Any], str]:
    config, folder = read_config(workdir), epath.Path(workdir)
    if which == "ema" and not config.optimizer.ema_decay:
        raise UserError("params: no average was kept (optimizer.ema_decay = 0); use --params=raw")
    if not (folder / "checkpoints").exists():
        raise UserError(f"workdir: {workdir} has no checkpoint yet; wait for the first of its training")
    which = which or (config.sample.params if config.optimizer.ema_decay else "raw")
    family = family_of(config.model)
    tokenizers = read_tokenizers(folder / "frozen", family)
    if task_of(config).denoises and len(tokenizers) != len(family.encoders):
        raise UserError(f"workdir: {folder / 'frozen'} lacks a tokenizer; restore it from a copy")
    digests.check(folder / "frozen")
    return config, tokenizers, which


def _open_pretrained(
    path: epath.PathLike, variant: str = "", lora: str = ""
) -> tuple[ConfigDict, Pipeline, dict[str, PyTree], int]:
    """The config of a model, its parts, their lazy tensors, and its step, as `_describe` says."""
    pretrained = open_checkpoint(path, variant)
    config = default_config()
    config.model.pretrained, config.model.variant = str(path), variant
    # bfloat16 is what accelerators are quick at, and what CPUs are slow at.
    config.model.dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    config.optimizer.ema_decay, config.sample.params = 0.0, "raw"
    config.lora.pretrained = lora
    config = resolve(config)
    # Adapters of text encoders belong to what is trained; a family's may have no layers for any.
    config.train.text_encoders = bool(lora)
    config.train.text_encoders = bool(adopt_lora(config))
    where, header = f"sample: {pretrained.path}", pretrained.metadata()
    if lora:  # its training decides on noise and process, where it says so
        own = read_metadata(lora, "lora.pretrained")
        where, header = (f"sample: {lora}", own) if "offsetjax.noise" in own else (where, header)
    pipeline = build(config, pretrained_tokenizers(config.model))
    step = _describe(config, pipeline, header, where)
    pipeline = replace(pipeline, noising=noising_of(config, pipeline.autoencoder.downscale))
    _draw_as_exported(config, pipeline, own if lora else header)
    tensors = {part: part_tensors(pretrained, part, pipeline.parts[part]) for part in pipeline.needed}
    return config, pipeline, tensors, step


def _draw_as_exported(config: ConfigDict, pipeline: Pipeline, header: Mapping[str, str]) -> None:
    """Sets `sample.shift` where a flow of ours was drawn with another shift than it was trained with."""
    if stored_shifts(header) and (scheduler := stored_scheduler(header)):
        _, height, width = pipeline.latent_shape(config.data.resolution)
        drawn, trained = scheduler["flow_shift"], grid_shift(pipeline, 0.0, height * width)
        if not math.isclose(drawn, trained, rel_tol=1e-6):
            config.sample.shift = drawn


def _describe(config: ConfigDict, pipeline: Pipeline, header: Mapping[str, str], where: str) -> int:
    """Sets the noise and the size of the training, as far as a file's header says; returns its step.

    That is 0 but where the noise depends on it.
    """
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
        if not 0 <= step <= config.train.steps:
            raise ValueError("ss_steps is not between 0 and ss_max_train_steps")
        validate(config)
        return step
    except (UserError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{where}: what its header says of its noise cannot be read ({error}); export it again"
        ) from error
