"""What a run minimises: one loss value an example, as a function of (trained, frozen, batch, seed, step).

Diffusion follows the pipeline: encode → noise → predict → compare. Each draw has a stream of its own.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree
from ml_collections import ConfigDict

from offsetjax.diffusion import loss as losses
from offsetjax.diffusion.process import add_noise
from offsetjax.models.encode import drop_captions, encode_batch, encode_captions, sample_latent, to_unit_range
from offsetjax.models.pipeline import Pipeline, join
from offsetjax.rng import stream_key

Batch = Mapping[str, Any]  # arrays, and token ids by text encoder
Objective = Callable[[PyTree, PyTree, Batch, Int[Array, ""]], Float[Array, " b"]]


def batch_keys(seed: int, name: str, step: Int[Array, ""], batch: Batch) -> Key[Array, " b"]:
    """A key an example, by its place in the global batch."""
    key = stream_key(seed, name, step)
    return jax.vmap(lambda position: jax.random.fold_in(key, position))(batch["position"])


def diffusion_objective(pipeline: Pipeline, seed: int, caption_dropout: float, loss: ConfigDict) -> Objective:
    """The weighted error of what the process of the pipeline's noising predicts, with the noise of the training.

    Each draw has a stream of its own: vae, caption_dropout, timestep, noise and input_perturbation.

    The batch holds `pixels` uint8 [b, H, W, 3] or, cached, `moments` float16 [b, 2, c, h, w]; `input_ids` by
    text encoder, int32 [b, n]; `time_ids` float32 [b, 6] and `position` int32 [b].

    Args:
        seed: of all draws.
        caption_dropout: the share of the captions that are replaced by the empty one.
        loss: the section of a config.
    """
    noising, process, density = pipeline.noising, pipeline.noising.process, pipeline.noising.density
    empty_ids = pipeline.tokens("").input_ids

    def objective(trained: PyTree, frozen: PyTree, batch: Batch, step: Int[Array, ""]) -> Float[Array, " b"]:
        params, noises = join(trained, frozen), noising.noise(step)

        def keys(name: str) -> Key[Array, " b"]:
            return batch_keys(seed, name, step, batch)

        # encode
        latents = encode_batch(pipeline.autoencoder, params.get(pipeline.family.autoencoder), batch, keys("vae"))
        params = after(latents, params)
        input_ids = drop_captions(keys("caption_dropout"), batch["input_ids"], empty_ids, caption_dropout)
        conditions = encode_captions(pipeline, params, input_ids, batch["time_ids"], empty_ids)
        params = after(conditions, params)
        # noise
        # A picture's mean is decided at the noisy end; a short fine-tuning may look there alone.
        pixels = latents.shape[2] * latents.shape[3]
        timesteps = jax.vmap(lambda key, position: process.draw_timestep(key, density, position, pixels))(
            keys("timestep"), batch["position"]
        )
        noise = jax.vmap(noises.draw)(keys("noise"), latents, timesteps)
        rate = jax.vmap(noises.rate)(keys("noise"), latents, timesteps)
        # In the input alone (arXiv 2301.11706): the target stays the noise itself.
        perturbed = perturb(keys("input_perturbation"), noise, noising.settings.input_perturbation)
        # loss
        noisy = jax.vmap(lambda x, n, t: add_noise(process, x, n, t))(latents, perturbed, timesteps)
        prediction = pipeline.denoise(params, noisy, process.network_timestep(timesteps), conditions)

        def example_loss(prediction, latent, noise, rate, timestep):
            error = losses.mean_squared_error(prediction, process.target(latent, noise, rate, timestep))
            variance = noises.variance(latent.shape[1], latent.shape[2], timestep)
            weight = losses.min_snr_weight(process, timestep, loss.min_snr_gamma, variance)
            if loss.weighting != "none":
                weight *= losses.flow_weight(process, timestep, loss.weighting)
            return weight * error

        return jax.vmap(example_loss)(prediction, latents, noise, rate, timesteps)

    return objective


def after(values: PyTree, params: PyTree) -> PyTree:
    """The parameters, not to be touched before the values are there.

    The compiler would gather the weights of the next network long before their turn, while the one before has the most
    activations of the step.
    """
    values = jax.lax.stop_gradient(values)

    @jax.custom_vjp
    def wait(params: PyTree) -> PyTree:
        return jax.lax.optimization_barrier((params, values))[0]

    wait.defvjp(lambda params: (wait(params), None), lambda _, gradients: (gradients,))
    return wait(params)


def perturb(keys: Key[Array, " b"], noise: Float[Array, "b c h w"], gamma: float) -> Float[Array, "b c h w"]:
    """The noise with `gamma` of plain noise added to it; with 0, the noise itself."""
    if gamma == 0:
        return noise
    return noise + gamma * jax.vmap(lambda key: jax.random.normal(key, noise.shape[1:]))(keys)


def autoencoder_objective(pipeline: Pipeline, seed: int, kl_weight: float) -> Objective:
    """Squared error of the reconstruction and `kl_weight` times the KL divergence of the posterior."""

    def objective(trained: PyTree, frozen: PyTree, batch: Batch, step: Int[Array, ""]) -> Float[Array, " b"]:
        params = join(trained, frozen)[pipeline.family.autoencoder]
        pixels = to_unit_range(batch["pixels"])
        means, log_variances = pipeline.autoencoder.encode(params, pixels)
        latents = jax.vmap(sample_latent)(batch_keys(seed, "vae", step, batch), means, log_variances)
        reconstruction = pipeline.autoencoder.decode(params, latents)

        def example_loss(reconstruction, pixels, mean, log_variance):
            kl = losses.kl_to_standard_normal(mean, log_variance)
            return losses.mean_squared_error(reconstruction, pixels) + kl_weight * kl

        return jax.vmap(example_loss)(reconstruction, pixels, means, log_variances)

    return objective


def add_position(batch: Batch, global_batch_size: int) -> dict[str, Any]:
    """The batch with each example's place in the global batch."""
    return {**batch, "position": jnp.arange(global_batch_size, dtype=jnp.int32)}
