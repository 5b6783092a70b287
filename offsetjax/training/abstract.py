"""What a train step takes, as shapes: to compile it, or to count its FLOPs, without any weight or picture."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
from ml_collections import ConfigDict

from offsetjax.models.initial import abstract_trained, pretrained_tokenizers
from offsetjax.models.pipeline import Pipeline, build, for_training, frozen_parts, text_parts
from offsetjax.models.tokenizer import train_tokenizer
from offsetjax.models.weights import abstract_params
from offsetjax.training.flops import count_flops
from offsetjax.training.objective import add_position, make_objective
from offsetjax.training.step import TrainState, init_state


def abstract_pipeline(config: ConfigDict) -> Pipeline:
    """The parts, with tokenizers that have read no caption: a program depends on the captions' length alone."""
    if config.task == "autoencoder":
        return build(config)
    if (tokenizers := pretrained_tokenizers(config)) is None:
        texts = [config.model[part] for part in text_parts(config)]
        words, length = min(text.vocab_size for text in texts), texts[0].max_position_embeddings
        tokenizers = (train_tokenizer(("",), words, length),) * len(texts)
    return build(config, tokenizers)


def abstract_state(config: ConfigDict, pipeline: Pipeline) -> TrainState:
    """The state before the first step."""
    return jax.eval_shape(lambda params: init_state(params, config), abstract_trained(config, pipeline))


def abstract_frozen(config: ConfigDict, pipeline: Pipeline) -> dict[str, PyTree]:
    """The frozen parts, in the types in which `weights.load_frozen` places them."""
    frozen = {}
    for part in frozen_parts(config):
        dtype = jnp.dtype("float32") if part == "vae" else jnp.dtype(config.model.dtype)
        like = abstract_params(getattr(pipeline, part))
        frozen[part] = jax.tree.map(lambda leaf, dtype=dtype: jax.ShapeDtypeStruct(leaf.shape, dtype), like)
    return frozen


def abstract_batch(config: ConfigDict) -> Mapping[str, jax.ShapeDtypeStruct]:
    """A global batch, as `data.devices` hands it to the step."""
    count, side = config.train.global_batch_size, config.data.resolution
    encoders, length = 1, 1  # an autoencoder reads no captions
    if config.task == "diffusion":
        parts = text_parts(config)
        encoders, length = len(parts), config.model[parts[0]].max_position_embeddings
    pictures = {"pixels": jax.ShapeDtypeStruct((count, side, side, 3), jnp.uint8)}
    if config.data.cached_latents:
        vae = build(config).vae
        latent = (vae.config["latent_channels"], side // vae.downscale, side // vae.downscale)
        pictures = {"moments": jax.ShapeDtypeStruct((count, 2, *latent), jnp.float16)}
    return {
        **pictures,
        "input_ids": jax.ShapeDtypeStruct((count, encoders, length), jnp.int32),
        "time_ids": jax.ShapeDtypeStruct((count, 6), jnp.float32),
        "is_truncated": jax.ShapeDtypeStruct((count,), jnp.bool_),
    }


def model_flops(config: ConfigDict, pipeline: Pipeline) -> int:
    """Matrix FLOPs of a step's forward and backward pass, over all devices together; nothing is computed twice."""
    config = config.copy_and_resolve_references()
    config.model.update(attention="xla", remat="none", scan_layers="always")  # loops are traced the fastest
    pipeline = for_training(pipeline, config, "cpu")
    objective = make_objective(pipeline, config)

    def gradient(params: PyTree, frozen: PyTree, batch: Mapping[str, jax.Array], step: jax.Array) -> PyTree:
        batch = add_position(batch, config.train.global_batch_size)
        return jax.grad(lambda params: objective(params, frozen, batch, step).mean())(params)

    state = abstract_state(config, pipeline)
    return count_flops(gradient, state.params, abstract_frozen(config, pipeline), abstract_batch(config), state.step)
