"""The train step of a config for given devices, as a program that can be compiled without any weight or picture."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict
from transformers import CLIPTokenizer

from offsetjax import sharding
from offsetjax.calibration import fill
from offsetjax.config import default_config, flatten
from offsetjax.errors import UserError
from offsetjax.models.initial import abstract_trained, adopt_lora, pretrained_tokenizers
from offsetjax.models.pipeline import Pipeline, build, frozen_parts, text_parts
from offsetjax.models.resolve import check_resolution, is_from_scratch, resolve
from offsetjax.models.tokenizer import train_tokenizer
from offsetjax.models.weights import abstract_params
from offsetjax.presets import stable_diffusion_1, stable_diffusion_2, stable_diffusion_xl
from offsetjax.run import Run
from offsetjax.step import init_state
from offsetjax.train import jit_train_step

_PRESETS = {"sd1": stable_diffusion_1, "sd2": stable_diffusion_2, "sdxl": stable_diffusion_xl}


class Program(NamedTuple):
    """The jitted step, the abstract `(state, frozen, batch)` that it takes, and where the state lies."""

    config: ConfigDict
    mesh: Mesh
    step: Any  # jitted, so that it can be traced and lowered
    arguments: tuple[PyTree, PyTree, PyTree]
    shardings: tuple[PyTree, PyTree, PyTree]


def make_program(config: ConfigDict, devices: list[Any]) -> Program:
    """The train step of a config that `architecture` has completed, on these devices.

    Raises:
        UserError: the mesh or the batch does not divide, or the architecture is none.
    """
    mesh = sharding.make_mesh(config, devices)
    pipeline = build(config, _tokenizers(config))
    state = jax.eval_shape(lambda params: init_state(params, config), abstract_trained(config, pipeline))
    frozen = _frozen(config, pipeline)
    run = Run(config, epath.Path("."), mesh, pipeline, frozen)
    places = sharding.shardings(mesh, state), sharding.shardings(mesh, frozen)
    batch = _batch(config)
    over_devices = jax.tree.map(lambda _: jax.sharding.NamedSharding(mesh, sharding.BATCH), batch)
    step = jit_train_step(run, places[0])
    return Program(config, mesh, step, (state, frozen, batch), (*places, over_devices))


def architecture(config: ConfigDict) -> ConfigDict:
    """The config with the architecture of `model.pretrained`, or, where that is not there, of its family's preset.

    Raises:
        UserError: settings that contradict it, as in a training.
    """
    if not config.model.pretrained or epath.Path(config.model.pretrained).exists():
        config = fill(resolve(config))
        adopt_lora(config)
    else:
        config = fill(_of_preset(config))
    if config.model.vae.scaling_factor == 0:  # a training standardises the latents before its first step
        config.model.vae.scaling_factor = 1.0
    check_resolution(config)
    return config


def _of_preset(config: ConfigDict) -> ConfigDict:
    config = config.copy_and_resolve_references()
    parts = [part for part in ("unet", "vae", *text_parts(config)) if not is_from_scratch(config, part)]
    if config.model.family:
        preset, defaults = default_config(), dict(flatten(default_config()))
        _PRESETS[config.model.family](preset)
        for path, value in flatten(preset):
            if path.rpartition(".")[0] not in {f"model.{part}" for part in parts}:
                continue
            section, _, leaf = path.removeprefix("model.").partition(".")
            given = config.model[section][leaf]
            if given not in (value, defaults[path]):
                raise UserError(
                    f"config: {path} = {given!r}, but {config.model.family} has {value!r}; leave it out, or name "
                    f"{section} in model.from_scratch"
                )
            config.model[section][leaf] = value
        config.model.force_zeros_for_empty_prompt = preset.model.force_zeros_for_empty_prompt
    # All shapes are known now, and no file has to be there.
    config.model.pretrained, config.model.from_scratch, config.lora.pretrained = "", (), ""
    return resolve(config)


def _tokenizers(config: ConfigDict) -> tuple[CLIPTokenizer, ...]:
    if config.task == "autoencoder":
        return ()
    if (pretrained := pretrained_tokenizers(config)) is not None:
        return pretrained
    texts = [config.model[part] for part in text_parts(config)]
    words, length = min(text.vocab_size for text in texts), texts[0].max_position_embeddings
    return (train_tokenizer(("",), words, length),) * len(texts)  # a program depends on the length alone


def _frozen(config: ConfigDict, pipeline: Pipeline) -> dict[str, PyTree]:
    """The frozen parts' shapes, in the types in which `load_frozen` places them."""
    frozen = {}
    for part in frozen_parts(config):
        dtype = jnp.dtype("float32") if part == "vae" else jnp.dtype(config.model.dtype)
        like = abstract_params(getattr(pipeline, part))
        frozen[part] = jax.tree.map(lambda leaf, dtype=dtype: jax.ShapeDtypeStruct(leaf.shape, dtype), like)
    return frozen


def _batch(config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch's shapes, as `data.devices` hands it to the step."""
    count, side = config.train.global_batch_size, config.data.resolution
    encoders, length = 1, 1  # an autoencoder reads no captions
    if config.task == "diffusion":
        parts = text_parts(config)
        encoders, length = len(parts), config.model[parts[0]].max_position_embeddings
    return {
        "pixels": jax.ShapeDtypeStruct((count, side, side, 3), jnp.uint8),
        "input_ids": jax.ShapeDtypeStruct((count, encoders, length), jnp.int32),
        "time_ids": jax.ShapeDtypeStruct((count, 6), jnp.float32),
        "is_truncated": jax.ShapeDtypeStruct((count,), jnp.bool_),
    }
