"""What a train step takes, as shapes: to compile it, or to count its FLOPs, without any weight or picture."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
from ml_collections import ConfigDict

from offsetjax.data.buckets import Size, square
from offsetjax.models.frozen import stored_dtype
from offsetjax.models.pipeline import Pipeline, build, for_training, frozen_parts
from offsetjax.models.task import task_of
from offsetjax.models.weights import abstract_params, abstract_trained, new_tokenizers, pretrained_tokenizers
from offsetjax.training.flops import count_flops
from offsetjax.training.objective import add_position, make_objective
from offsetjax.training.step import TrainState, init_state


def abstract_pipeline(config: ConfigDict) -> Pipeline:
    """The parts, with tokenizers that have read no caption: a program depends on the captions' length alone."""
    if not task_of(config).denoises:
        return build(config)
    if (tokenizers := pretrained_tokenizers(config)) is None:
        tokenizers = new_tokenizers(config, ("",))
    return build(config, tokenizers)


def abstract_state(config: ConfigDict, pipeline: Pipeline) -> TrainState:
    """The state before the first step."""
    return jax.eval_shape(lambda params: init_state(params, config), abstract_trained(config, pipeline))


def abstract_frozen(config: ConfigDict, pipeline: Pipeline) -> dict[str, PyTree]:
    """The frozen parts, in the types in which `weights.load_frozen` places them."""
    frozen = {}
    for part in frozen_parts(config):
        dtype = stored_dtype(pipeline, part)
        like = abstract_params(pipeline.parts[part])
        frozen[part] = jax.tree.map(lambda leaf, dtype=dtype: jax.ShapeDtypeStruct(leaf.shape, dtype), like)
    return frozen


def abstract_batch(
    config: ConfigDict, pipeline: Pipeline, size: Size | None = None, count: int | None = None
) -> Mapping[str, Any]:
    """A global batch, as `data.devices` hands it to the step; of squares where no size is given.

    Args:
        count: its examples; by default `train.global_batch_size`.
    """
    count, (width, height) = count or config.train.global_batch_size, size or square(config.data.resolution)
    pictures = {"pixels": jax.ShapeDtypeStruct((count, height, width, 3), jnp.uint8)}
    if config.data.cached_latents:
        vae = pipeline.autoencoder
        latent = (vae.latent_channels, height // vae.downscale, width // vae.downscale)
        pictures = {"moments": jax.ShapeDtypeStruct((count, 2, *latent), jnp.float16)}
    return {
        **pictures,
        "input_ids": {
            part: jax.ShapeDtypeStruct((count, len(ids)), jnp.int32)
            for part, ids in pipeline.tokens("").input_ids.items()
        },
        "time_ids": jax.ShapeDtypeStruct((count, 6), jnp.float32),
        "is_truncated": jax.ShapeDtypeStruct((count,), jnp.bool_),
        "is_replaced": jax.ShapeDtypeStruct((count,), jnp.bool_),
    }


def model_flops(config: ConfigDict, pipeline: Pipeline, size: Size | None = None, count: int | None = None) -> int:
    """Matrix FLOPs of a step's forward and backward pass, over all devices together; nothing is computed twice."""
    config = config.copy_and_resolve_references()
    config.model.update(attention="xla", remat="none", scan_layers="always")  # loops are traced the fastest
    pipeline = for_training(pipeline, config, "cpu")
    objective = make_objective(pipeline, config)

    def gradient(params: PyTree, frozen: PyTree, batch: Mapping[str, jax.Array], step: jax.Array) -> PyTree:
        batch = add_position(batch, batch["is_truncated"].shape[0])
        return jax.grad(lambda params: objective(params, frozen, batch, step).mean())(params)

    state = abstract_state(config, pipeline)
    batch = abstract_batch(config, pipeline, size, count)
    return count_flops(gradient, state.params, abstract_frozen(config, pipeline), batch, state.step)
