"""Layers that repeat are compiled once: the first in a loop over the weights of all.

SDXL's transformers have up to ten blocks that differ in their weights alone, text encoders up to 32 layers. No
parameter changes its name: the weights are stacked where they are used. In a loop the compiler cannot gather the
weights of all layers long before their use. Where the backward pass computes a layer again, it stacks the weights
again as well, which would else lie there, a second time, from the forward pass on.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from offsetjax.models.blocks import Blocks

# (a layer's weights, hidden, whatever else all layers are given) → hidden.
Layer = Callable[[PyTree, Array, PyTree], Array]


def scanned(blocks: Blocks, remat: str = "none") -> AbstractContextManager[None]:
    """A context in which the layers of a network that repeat are traced as loops.

    Args:
        blocks: of the network that is traced.
        remat: the policy of `remat.py`; where it has the layers computed again, nothing but their inputs is kept.
    """
    return nn.intercept_methods(functools.partial(_interceptor, blocks=blocks, again=blocks.recomputed(remat)))


def _interceptor(
    next_function: Callable,
    args: tuple,
    kwargs: dict,
    context: nn.module.InterceptorContext,
    *,
    blocks: Blocks,
    again: tuple[type[nn.Module], ...],
) -> Any:
    layer = context.module
    if context.method_name != "__call__" or layer.is_initializing():
        return next_function(*args, **kwargs)
    layers = blocks.repeated(layer)
    if len(layers) < 2 or layer.name not in [each.name for each in layers]:
        return next_function(*args, **kwargs)
    params = [each.variables["params"] for each in layers]
    if len({jax.tree.structure(each) for each in params}) > 1:  # as where a LoRA adapts some of them
        return next_function(*args, **kwargs)
    hidden, *others = args
    if layer.name == layers[0].name:  # with the weights of all; the others have nothing left to do
        module = layer.clone(parent=None, name=None)

        def of_module(params: PyTree, hidden: Array, others: Sequence[Any]) -> Array:
            output: Any = module.apply({"params": params}, hidden, *others, **kwargs)
            return output

        loop = _recomputed_loop if isinstance(layer, again) else _loop
        hidden = loop(of_module, params, hidden, others)
    return hidden


def _loop(layer: Layer, params: Sequence[PyTree], hidden: Array, others: PyTree) -> Array:
    return jax.lax.scan(lambda hidden, params: (layer(params, hidden, others), None), hidden, _stack(params))[0]


def _recomputed_loop(layer: Layer, params: Sequence[PyTree], hidden: Array, others: PyTree) -> Array:
    """The same; the backward pass has the inputs of the layers, and stacks their weights again."""
    # Traced here: the contexts that make the layer what it is have ended when the backward pass is traced.
    traced, closed_over = jax.closure_convert(layer, params[0], hidden, others)
    return _recomputed(
        lambda params, hidden, others: traced(params, hidden, *others), params, hidden, (others, *closed_over)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recomputed(layer: Layer, params: Sequence[PyTree], hidden: Array, others: PyTree) -> Array:
    return _loop(layer, params, hidden, others)


def _forward(layer: Layer, params: Sequence[PyTree], hidden: Array, others: PyTree) -> tuple[Array, PyTree]:
    def body(hidden: Array, params: PyTree) -> tuple[Array, Array]:
        return layer(params, hidden, others), hidden

    output, inputs = jax.lax.scan(body, hidden, _stack(params))
    return output, (params, inputs, others)


def _backward(layer: Layer, kept: PyTree, gradient: Array) -> tuple[Sequence[PyTree], Array, PyTree]:
    params, inputs, others = kept
    # Else the compiler would find that the weights were stacked before, and keep them.
    params, gradient = jax.lax.optimization_barrier((params, gradient))

    def body(
        gradients: tuple[Array, PyTree], layer_and_input: tuple[PyTree, Array]
    ) -> tuple[tuple[Array, PyTree], PyTree]:
        pull_back = jax.vjp(layer, *layer_and_input, others)[1]
        of_params, of_hidden, of_others = pull_back(gradients[0])
        return (of_hidden, [x + y for x, y in zip(gradients[1], _real(of_others), strict=True)]), of_params

    none = [jnp.zeros_like(leaf) for leaf in _real(others)]
    (gradient, of_real), of_params = jax.lax.scan(body, (gradient, none), (_stack(params), inputs), reverse=True)
    sums = iter(of_real)
    of_others = jax.tree.map(lambda leaf: next(sums) if _is_real(leaf) else _no_gradient(leaf), others)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], of_params) for i in range(len(params))], gradient, of_others


_recomputed.defvjp(_forward, _backward)


def _real(tree: PyTree) -> list[Array]:
    """The leaves that have a gradient: not the lengths of sequences."""
    return [leaf for leaf in jax.tree.leaves(tree) if _is_real(leaf)]


def _is_real(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _no_gradient(leaf: Array) -> np.ndarray:
    return np.zeros(leaf.shape, jax.dtypes.float0)


def _stack(params: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *each: jnp.stack(each), *params)
