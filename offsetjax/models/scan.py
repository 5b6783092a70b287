"""Layers that repeat are compiled once: the first in a loop over the weights of all.

SDXL's transformers have up to ten blocks that differ in their weights alone, text encoders up to 32 layers. No
parameter changes its name: the weights are stacked where they are used. In a loop the compiler cannot gather the
weights of all layers long before their use.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from diffusers.models.attention_flax import FlaxBasicTransformerBlock, FlaxTransformer2DModel
from jaxtyping import Array, PyTree
from transformers.models.clip.modeling_flax_clip import FlaxCLIPEncoderLayer, FlaxCLIPLayerCollection


def scanned() -> AbstractContextManager[None]:
    """A context in which layers that repeat, in denoisers and text encoders, are traced as loops."""
    return nn.intercept_methods(_interceptor)


def _repeated(layer: nn.Module) -> Sequence[nn.Module]:
    """The layers alike that follow upon each other, of which this is one; none where it stands alone."""
    parent = layer.parent
    if isinstance(layer, FlaxBasicTransformerBlock) and isinstance(parent, FlaxTransformer2DModel):
        return parent.transformer_blocks
    if isinstance(layer, FlaxCLIPEncoderLayer) and isinstance(parent, FlaxCLIPLayerCollection):
        return parent.layers[:-1]  # SDXL reads what the last one is given
    return ()


def _interceptor(next_function: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
    layer = context.module
    if context.method_name != "__call__" or layer.is_initializing():
        return next_function(*args, **kwargs)
    layers = _repeated(layer)
    if len(layers) < 2 or layer.name not in [each.name for each in layers]:
        return next_function(*args, **kwargs)
    params = [each.variables["params"] for each in layers]
    if len({jax.tree.structure(each) for each in params}) > 1:  # as where a LoRA adapts some of them
        return next_function(*args, **kwargs)
    hidden, *others = args
    if layer.name == layers[0].name:  # with the weights of all; the others have nothing left to do
        hidden = _loop(layer.clone(parent=None, name=None), params, hidden, others, kwargs)
    return (hidden,) if isinstance(layer, FlaxCLIPEncoderLayer) else hidden


def _loop(layer: nn.Module, params: Sequence[PyTree], hidden: Array, others: Sequence[Any], kwargs: dict) -> Array:
    def body(hidden: Array, params: PyTree) -> tuple[Array, None]:
        output: Any = layer.apply({"params": params}, hidden, *others, **kwargs)
        return output[0] if isinstance(output, tuple) else output, None

    return jax.lax.scan(body, hidden, jax.tree.map(lambda *each: jnp.stack(each), *params))[0]
