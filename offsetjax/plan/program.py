"""The train step of a config for given devices, as a program that can be compiled without any weight or picture."""

from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from offsetjax.config import default_config, flatten
from offsetjax.data.buckets import Size, square
from offsetjax.errors import UserError
from offsetjax.models.family import family_of
from offsetjax.models.pipeline import Pipeline, is_from_scratch
from offsetjax.models.resolve import adopt_lora, calibrated, check_resolution, resolve
from offsetjax.models.weights import abstract_trained
from offsetjax.parallel import sharding
from offsetjax.training.abstract import abstract_batch, abstract_frozen, abstract_pipeline, abstract_state
from offsetjax.training.placed import jit_train_step
from offsetjax.training.setup import Run
from offsetjax.training.step import make_update


class Program(NamedTuple):
    """The jitted step, the abstract `(state, frozen, batch)` that it takes, and where the state lies."""

    config: ConfigDict
    pipeline: Pipeline
    mesh: Mesh
    step: Any  # jitted, so that it can be traced and lowered
    arguments: tuple[PyTree, PyTree, PyTree]
    shardings: tuple[PyTree, PyTree, PyTree]


def make_program(config: ConfigDict, devices: list[Any], size: Size | None = None, count: int | None = None) -> Program:
    """The train step of a config that `architecture` has completed, on these devices.

    Args:
        size: of the pictures, where there are several.
        count: examples of a batch of that size.

    Raises:
        UserError: the mesh or the batch does not divide, or the architecture is none.
    """
    train, data, pipeline = config.train, config.data, abstract_pipeline(config)
    mesh = sharding.make_mesh(config.mesh, train, devices)
    run = Run(config, epath.Path("."), mesh, pipeline, abstract_frozen(pipeline))
    state = abstract_state(abstract_trained(pipeline, config.lora), make_update(config.optimizer, train, config.model))
    frozen = run.step_frozen
    size, count = size or square(data.resolution), count or train.global_batch_size
    batch = abstract_batch(pipeline, size, count, data.cached_latents)
    places = tuple(sharding.shardings(mesh, pipeline.sharding, tree) for tree in (state, frozen))
    over_devices = jax.tree.map(lambda _: jax.sharding.NamedSharding(mesh, sharding.BATCH), batch)
    step = jit_train_step(run, places[0])
    return Program(config, pipeline, mesh, step, (state, frozen, batch), (*places, over_devices))


def architecture(config: ConfigDict) -> ConfigDict:
    """The config with the architecture of `model.pretrained`, or, where that is not there, of its family's preset.

    Raises:
        UserError: settings that contradict it, as in a training.
    """
    if not config.model.pretrained or epath.Path(config.model.pretrained).exists():
        config = calibrated(resolve(config))
        adopt_lora(config)
    else:
        config = calibrated(_of_preset(config))
    vae = config.model[family_of(config.model).autoencoder]
    if vae.get("scaling_factor") == 0:  # a training standardises the latents before its first step
        vae.scaling_factor = 1.0
    check_resolution(config)
    return config


def _of_preset(config: ConfigDict) -> ConfigDict:
    config = config.copy_and_resolve_references()
    if config.lora.pretrained and not config.lora.rank:
        raise UserError(
            f"config: the rank of lora.pretrained = {config.lora.pretrained!r} is not read without model.pretrained, "
            f"and {config.model.pretrained} is not there; give it as lora.rank"
        )
    parts = [part for part in family_of(config.model).parts if not is_from_scratch(config.model, part)]
    if config.model.family:
        preset, defaults = default_config(), dict(flatten(default_config()))
        family_of(config.model).preset(preset)
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
        for key in family_of(config.model).files.said_by_index:
            config.model[key] = preset.model[key]
    # All shapes are known now, and no file has to be there.
    config.model.pretrained, config.model.from_scratch, config.lora.pretrained = "", (), ""
    return resolve(config)
