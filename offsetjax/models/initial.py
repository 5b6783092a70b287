"""The weights before the first step: a pretrained model's, a LoRA's, or drawn at random."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import PyTree
from ml_collections import ConfigDict

from offsetjax.config import assign, default_config, is_explicit
from offsetjax.errors import UserError
from offsetjax.formats.lora import LoadedLora, read_lora
from offsetjax.formats.names import flax_tensors, torch_tensors
from offsetjax.formats.pretrained import Pretrained
from offsetjax.formats.tensors import Tensor, inspected
from offsetjax.models.family import family_of, open_checkpoint
from offsetjax.models.lora import init_adapters
from offsetjax.models.pipeline import Pipeline, build, trained_parts
from offsetjax.models.resolve import default_targets, is_from_scratch
from offsetjax.models.task import task_of
from offsetjax.models.weights import abstract_params, load, on_host
from offsetjax.parallel.sharding import path_name
from offsetjax.rng import stream_key


def part_tensors(pretrained: Pretrained, part: str, model: Any) -> PyTree:
    """A part's tensors in Flax's layout, checked against the model and not read yet.

    Raises:
        UserError: missing, extra or misshapen tensors, by name.
    """
    where = f"model.pretrained: {pretrained.path}: {part}"
    return flax_tensors(pretrained.tensors(part), abstract_params(model), where)


def initial_params(config: ConfigDict, part: str, model: Any, shardings: PyTree | None = None) -> PyTree:
    """A part's float32 parameters before training: loaded, or drawn at random from the stream `init/part`.

    Args:
        shardings: where they lie; None: on the host.

    Raises:
        UserError: a loaded one has values that are not finite.
    """
    if is_from_scratch(config, part):
        return jax.jit(model.init, out_shardings=shardings)(stream_key(config.seed, f"init/{part}"))
    tensors = part_tensors(open_checkpoint(config.model.pretrained, config.model.variant), part, model)
    where = f"model.pretrained: {config.model.pretrained}: {part}"
    tensors = jax.tree_util.tree_map_with_path(lambda path, tensor: _finite(tensor, where + path_name(path)), tensors)
    return on_host(tensors) if shardings is None else load(tensors, shardings, np.float32)


def _finite(tensor: Tensor, name: str) -> Tensor:
    def check(array: np.ndarray) -> None:
        if not np.isfinite(array).all():
            raise UserError(f"{name} has values that are not finite; give another model, or another copy of it")

    return inspected(tensor, check)


def initial_tensors(config: ConfigDict, part: str, model: Any) -> dict[str, Tensor]:
    """A part before training by PyTorch's names: loaded, in the type in which it is stored, or drawn at random."""
    if is_from_scratch(config, part):
        return torch_tensors(jax.device_get(initial_params(config, part, model)))
    return torch_tensors(part_tensors(open_checkpoint(config.model.pretrained, config.model.variant), part, model))


def carried_tensors(config: ConfigDict) -> dict[str, Tensor]:
    """What a single file has beyond the parts, kept so that an export can give it back."""
    if not config.model.pretrained or not task_of(config).denoises:
        return {}
    return open_checkpoint(config.model.pretrained, config.model.variant).carried()


def left_out_tensors(config: ConfigDict) -> tuple[str, ...]:
    """The names of what a single file holds of its own training, which is no part of a model."""
    if not config.model.pretrained:
        return ()
    return tuple(open_checkpoint(config.model.pretrained, config.model.variant).ignored())


def pretrained_tokenizers(config: ConfigDict) -> dict[str, Any] | None:
    """The tokenizers that come with the weights, by text encoder; None where captions have to teach one.

    A single file has none, and gets those that all models of its family have; so does a text encoder that is drawn at
    random, if it knows as many tokens.

    Raises:
        UserError: the checkpoint brings none, and its family has none of its own, or they do not fit the encoders.
    """
    family, folder = family_of(config), epath.Path(config.model.pretrained)
    tokenizing, is_learned = family.tokenizing, is_from_scratch(config, "tokenizer")
    if not is_learned and folder.is_dir():
        found = {}
        for part, name in tokenizing.folders.items():
            tokenizer = tokenizing.load(folder / name)
            try:
                found[part] = tokenizing.fit(tokenizer, config.model[part])
            except ValueError as error:
                raise UserError(
                    f"model.pretrained: {folder}: {part} has {error}; give the tokenizer that it was trained with"
                ) from error
        return found
    published = tokenizing.published(config.model)
    if published is None and not is_learned:
        raise UserError(
            f"model.pretrained: {folder} brings no tokenizer, and its text encoders know other tokens than those of "
            f"{family.title}; give a diffusers directory"
        )
    return published


def new_tokenizers(config: ConfigDict, captions: Sequence[str]) -> dict[str, Any]:
    """Tokenizers by text encoder, which have learnt their words from captions."""
    return family_of(config).tokenizing.new(config.model, captions)


def abstract_trained(config: ConfigDict, pipeline: Pipeline) -> dict[str, PyTree]:
    """The shapes of what a run trains, by part: whole parts, or their adapters."""
    models = {part: pipeline.parts[part] for part in trained_parts(config)}
    if not config.lora.rank:
        return {part: abstract_params(model) for part, model in models.items()}
    return jax.eval_shape(lambda: {part: _new_adapters(config, part, model) for part, model in models.items()})


def initial_trained(config: ConfigDict, pipeline: Pipeline, shardings: dict[str, PyTree]) -> dict[str, PyTree]:
    """What a run trains before its first step, by part, in float32.

    Raises:
        UserError: the model or the LoRA to start from cannot be read, or is another architecture's.
    """
    models = {part: pipeline.parts[part] for part in trained_parts(config)}
    if config.lora.rank:
        new = {part: _new_adapters(config, part, model) for part, model in models.items()}
        loaded = _read_lora(config).adapters if config.lora.pretrained else {}
        return jax.device_put({**new, **loaded}, shardings)
    return {part: initial_params(config, part, model, shardings[part]) for part, model in models.items()}


def check_initial(config: ConfigDict, pipeline: Pipeline) -> None:
    """Raises the UserErrors of `initial_trained`, from the headers of the files, before anything is written."""
    abstract_trained(config, pipeline)
    for part in trained_parts(config):
        if not config.lora.rank and not is_from_scratch(config, part):
            initial_tensors(config, part, pipeline.parts[part])


def _new_adapters(config: ConfigDict, part: str, model: Any) -> PyTree:
    key = stream_key(config.seed, f"init/{part}/adapters")
    field = "targets" if part == family_of(config).denoiser else "text_encoder_targets"
    return init_adapters(key, abstract_params(model), config.lora[field], config.lora.rank, f"lora.{field}")


def adopt_lora(config: ConfigDict) -> None:
    """Sets rank, alpha and targets of `config.lora` to those of `lora.pretrained`, where there is one.

    Raises:
        UserError: a setting that contradicts it, or adapters of a part that the config freezes.
    """
    if not config.lora.pretrained:
        return
    loaded = _read_lora(config)
    family = family_of(config)
    defaults = {**default_config().lora.to_dict(), **default_targets(family)}
    found: dict[str, Any] = {"rank": loaded.rank, "alpha": float(loaded.alpha)}
    found |= {"targets": loaded.targets(family.denoiser)} if family.denoiser in loaded.adapters else {}
    text = [part for part in family.encoders if part in loaded.adapters]
    if text and not config.train.text_encoders:
        raise UserError(
            f"lora.pretrained: {config.lora.pretrained} adapts {text[0]}, which is frozen; set "
            "train.text_encoders = True; a tiny optimizer.text_encoder_learning_rate keeps it as it is"
        )
    if text:
        found["text_encoder_targets"] = loaded.targets(*text)
    settings = config.lora.to_dict()
    settings["alpha"] = settings["alpha"] or float(settings["rank"])  # what 0 says
    contradicted = {}
    for key, value in found.items():
        is_same = settings[key] == value or (isinstance(value, tuple) and set(settings[key]) == set(value))
        if not is_same and (is_explicit(config, f"lora.{key}") or config.lora[key] != defaults[key]):
            contradicted[key] = value
    if contradicted:
        given = ", ".join(f"lora.{key} = {config.lora[key]!r}" for key in contradicted)
        flags = [f"--config.lora.{key}={value}" for key, value in contradicted.items()]
        lines = " ".join(f'"{flag}"' if "(" in flag else flag for flag in flags)
        raise UserError(f"config: {given}, but {config.lora.pretrained} has others; train with its own: {lines}")
    for key, value in found.items():
        assign(config, f"lora.{key}", value, explicit=False)


def _read_lora(config: ConfigDict) -> LoadedLora:
    plain = config.copy_and_resolve_references()
    plain.lora.rank = 0
    bare = build(plain)
    bases = {part: abstract_params(bare.parts[part]) for part in bare.parts if part != bare.family.autoencoder}
    return read_lora(config.lora.pretrained, bases, bare.family.name)
