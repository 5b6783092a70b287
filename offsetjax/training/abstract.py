"""What a train step takes, as shapes: to compile it, or to count its FLOPs, without any weight or picture."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
from ml_collections import ConfigDict

from offsetjax.data.buckets import Size, square
from offsetjax.models.frozen import stored_dtype
from offsetjax.models.pipeline import Pipeline, build, for_training
from offsetjax.models.task import task_of
from offsetjax.models.weights import abstract_params, abstract_trained, new_tokenizers, pretrained_tokenizers
from offsetjax.training.flops import count_flops
from offsetjax.training.objective import Batch, add_position
from offsetjax.training.step import TrainState, Update, init_state


def abstract_pipeline(config: ConfigDict) -> Pipeline:
    """The parts, with tokenizers that have read no caption: a program depends on the captions' length alone."""
    if not task_of(config).denoises:
        return build(config)
    if (tokenizers := pretrained_tokenizers(config.model)) is None:
        tokenizers = new_tokenizers(config.model, ("",))
    return build(config, tokenizers)


def abstract_state(trained: PyTree, update: Update) -> TrainState:
    """The state before the first step, of what is trained."""
    return jax.eval_shape(lambda params: init_state(params, update), trained)


def abstract_frozen(pipeline: Pipeline) -> dict[str, PyTree]:
    """The frozen parts, in the types in which `weights.load_frozen` places them."""
    frozen = {}
    for part in pipeline.frozen:
        dtype = stored_dtype(pipeline, part)
        like = abstract_params(pipeline.parts[part])
        frozen[part] = jax.tree.map(lambda leaf, dtype=dtype: jax.ShapeDtypeStruct(leaf.shape, dtype), like)
    return frozen


def abstract_batch(pipeline: Pipeline, size: Size, count: int, cached_latents: bool = False) -> Batch:
    """A global batch of `count` pictures of a size, or of their latents, as `data.devices` hands it to the step."""
    width, height = size
    pictures = {"pixels": jax.ShapeDtypeStruct((count, height, width, 3), jnp.uint8)}
    if cached_latents:
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
    resolution = config.data.resolution
    quick = {"attention": "xla", "remat": "none", "scan_layers": "always"}  # loops are traced the fastest
    traced = for_training(replace(pipeline, settings={**pipeline.settings, **quick}), resolution, "cpu")
    objective = task_of(config).objective(traced, config)

    def gradient(params: PyTree, frozen: PyTree, batch: Batch, step: jax.Array) -> PyTree:
        batch = add_position(batch, batch["is_truncated"].shape[0])
        return jax.grad(lambda params: objective(params, frozen, batch, step).mean())(params)

    size, count = size or square(resolution), count or config.train.global_batch_size
    batch = abstract_batch(traced, size, count, config.data.cached_latents)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return count_flops(gradient, abstract_trained(traced, config.lora), abstract_frozen(traced), batch, step)
