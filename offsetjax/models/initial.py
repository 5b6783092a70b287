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
from offsetjax.formats.pretrained import Pretrained, open_pretrained
from offsetjax.formats.tensors import Tensor, inspected
from offsetjax.models.family import family_of
from offsetjax.models.lora import init_adapters
from offsetjax.models.pipeline import Pipeline, build, trained_parts
from offsetjax.models.resolve import is_from_scratch
from offsetjax.models.tokenizer import clip_tokenizer, load_tokenizer, train_tokenizer
from offsetjax.models.weights import abstract_params, load, on_host
from offsetjax.parallel.sharding import path_name
from offsetjax.rng import stream_key

CLIP_VOCABULARY = 49408  # tokens of CLIP's own vocabulary, which the text encoders of every family know


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
    tensors = part_tensors(open_pretrained(config.model.pretrained, config.model.variant), part, model)
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
    return torch_tensors(part_tensors(open_pretrained(config.model.pretrained, config.model.variant), part, model))


def carried_tensors(config: ConfigDict) -> dict[str, Tensor]:
    """What a single file has beyond the parts, kept so that an export can give it back."""
    if not config.model.pretrained or config.task != "diffusion":
        return {}
    return open_pretrained(config.model.pretrained, config.model.variant).carried()


def left_out_tensors(config: ConfigDict) -> tuple[str, ...]:
    """The names of what a single file holds of its own training, which is no part of a model."""
    if not config.model.pretrained:
        return ()
    return tuple(open_pretrained(config.model.pretrained, config.model.variant).ignored())


def pretrained_tokenizers(config: ConfigDict) -> dict[str, Any] | None:
    """The tokenizers that come with the weights; None where captions have to teach one.

    Single files have none: every family's is CLIP's, and OpenCLIP pads with "!". So has a text encoder that is drawn at
    random, if it knows as many tokens as CLIP's.
    """
    family = family_of(config)
    parts = family.encoders
    is_learned = is_from_scratch(config, "tokenizer")
    if is_learned and any(config.model[part].vocab_size != CLIP_VOCABULARY for part in parts):
        return None
    folder = epath.Path(config.model.pretrained)
    if not is_learned and folder.is_dir():
        tokenizers = {part: load_tokenizer(folder / family.tokenizer_folders[part]) for part in parts}
        for part, tokenizer in tokenizers.items():
            known = config.model[part].vocab_size
            if len(tokenizer) > known:
                raise UserError(
                    f"model.pretrained: {folder} has a tokenizer of {len(tokenizer)} tokens, of which its {part} knows "
                    f"{known}; give the tokenizer that it was trained with"
                )
        # Some files do not say how long a caption may be.
        return {part: each.shortened(config.model[part].max_position_embeddings) for part, each in tokenizers.items()}
    if any(config.model[part].vocab_size != CLIP_VOCABULARY for part in parts):
        raise UserError(
            f"model.pretrained: {folder} brings no tokenizer, and its text encoder knows "
            f"{config.model.text_encoder.vocab_size} tokens where CLIP's has {CLIP_VOCABULARY}; give a diffusers "
            "directory"
        )
    is_open_clip = {"sd1": (False,), "sd2": (True,), "sdxl": (False, True)}[family.name]
    pads = ["!" if each else "<|endoftext|>" for each in is_open_clip]
    return {part: clip_tokenizer(pad) for part, pad in zip(parts, pads, strict=True)}


def new_tokenizers(config: ConfigDict, captions: Sequence[str]) -> dict[str, Any]:
    """One tokenizer for all text encoders, which has learnt its words from captions."""
    parts = family_of(config).encoders
    texts = [config.model[part] for part in parts]
    words, length = min(text.vocab_size for text in texts), texts[0].max_position_embeddings
    return dict.fromkeys(parts, train_tokenizer(captions, words, length))


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
    defaults = default_config().lora
    found: dict[str, Any] = {"rank": loaded.rank, "alpha": float(loaded.alpha)}
    family = family_of(config)
    found |= {"targets": loaded.targets(family.denoiser)} if family.denoiser in loaded.adapters else {}
    text = [part for part in family.encoders if part in loaded.adapters]
    if text and not config.optimizer.text_encoder_learning_rate:
        raise UserError(
            f"lora.pretrained: {config.lora.pretrained} adapts {text[0]}, which is frozen; set "
            "optimizer.text_encoder_learning_rate, if only to a tiny one that keeps it as it is"
        )
    if text:
        found["text_encoder_targets"] = loaded.targets(*text)
    for key, value in found.items():
        is_same = config.lora[key] == value or (isinstance(value, tuple) and set(config.lora[key]) == set(value))
        is_stated = is_explicit(config, f"lora.{key}") or config.lora[key] != defaults[key]
        if not is_same and is_stated:
            raise UserError(
                f"config: lora.{key} = {config.lora[key]!r}, but {config.lora.pretrained} has {value!r}; set it to that"
            )
        assign(config, f"lora.{key}", value, explicit=False)


def _read_lora(config: ConfigDict) -> LoadedLora:
    plain = config.copy_and_resolve_references()
    plain.lora.rank = 0
    bare = build(plain)
    bases = {part: abstract_params(bare.parts[part]) for part in bare.parts if part != bare.family.autoencoder}
    return read_lora(config.lora.pretrained, bases, bare.family.name)
