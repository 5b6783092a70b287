"""Two ways to compute one model: the same loss and gradients; and what waits for the backward pass."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import PyTree

from offsetjax.models.lora import Adapted
from offsetjax.models.unet import UNet

Gradients = tuple[jax.Array, PyTree]


def loss_of(unet: UNet | Adapted) -> Callable[[PyTree], jax.Array]:
    """A loss of a small denoiser's parameters."""
    latents = jax.random.normal(jax.random.key(1), (2, 4, 16, 16))
    hidden = jax.random.normal(jax.random.key(2), (2, 8, unet.config["cross_attention_dim"]))
    return lambda params: jnp.square(unet.apply(params, latents, jnp.array([3, 700]), hidden)).mean()


def gradients_of(unet: UNet | Adapted, params: PyTree) -> Gradients:
    """The loss and its gradient."""
    return jax.jit(jax.value_and_grad(loss_of(unet)))(params)


def assert_alike(these: Gradients, those: Gradients) -> None:
    """Equal but for the rounding of float32."""
    (loss, gradients), (other_loss, other_gradients) = these, those
    assert float(loss) == pytest.approx(float(other_loss), rel=1e-6)
    assert jax.tree.structure(gradients) == jax.tree.structure(other_gradients)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(other_gradients))
    apart = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), gradients, other_gradients)
    assert max(jax.tree.leaves(apart)) < 1e-5 * largest


def kept(unet: UNet | Adapted, params: PyTree) -> int:
    """Bytes that wait for the backward pass, beside the parameters."""
    backward = jax.eval_shape(lambda params: jax.vjp(loss_of(unet), params)[1], params)
    return sum(each.size * each.dtype.itemsize for each in jax.tree.leaves(backward)) - sum(
        each.size * each.dtype.itemsize for each in jax.tree.leaves(params)
    )
