"""Fully sharded data parallelism (Rajbhandari et al. 2019, arXiv 1910.02054; PyTorch's FSDP), explicitly.

Each device computes the loss of its own examples, with weights of which it holds a shard. Where a layer asks for a
weight, the devices of the `fsdp` axis put their shards together, in the compute type; where its gradient comes back,
each receives the sum of its own shard alone, in float32:

    forward, and backward where it is computed again     all-gather        2 bytes a parameter in bfloat16
    backward                                             reduce-scatter    4 bytes
    once a step, over `data`, and for what is not split  all-reduce        4 bytes of the shards

Left to itself, the compiler gathers in float32, several times, and reduces whole gradients.
"""

import functools
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax.core import meta
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PyTree

from offsetjax.parallel import sharding
from offsetjax.parallel.sharding import Rule

Loss = Float[Array, ""]
Rings = tuple[tuple[tuple[int, ...], ...], ...]
# (params, frozen, batch, step) → (loss, gradients), of a batch or of a device's part of it.
Gradient = Callable[[PyTree, PyTree, PyTree, Array], tuple[Loss, PyTree]]


class Shard(flax.struct.PyTreeNode, meta.AxisMetadata):
    """A device's shard of a weight, in place of the weight: Flax unboxes it where a layer asks for the parameter.

    Attributes:
        axis: the one that is split over `fsdp`.
        dtype: that the layer computes in.
        rings: see `sharding.rings`.
    """

    value: Any
    axis: int = flax.struct.field(pytree_node=False)
    dtype: Any = flax.struct.field(pytree_node=False)
    rings: Rings = flax.struct.field(pytree_node=False)

    def unbox(self) -> Array:
        """The whole weight."""
        return _gather(self.value, self.axis, self.dtype, self.rings)

    def replace_boxed(self, val: Any) -> "Shard":
        """Flax's: the same box around another value."""
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Shard":
        """Flax's, of a transformation that stacks layers."""
        return self.replace(axis=self.axis + (index <= self.axis))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "Shard":
        """Flax's, of a transformation that takes stacked layers apart."""
        return self.replace(axis=self.axis - (index < self.axis))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(shard: Array, axis: int, dtype: Any, rings: Rings) -> Array:
    return jax.lax.all_gather(shard.astype(dtype), "fsdp", axis=axis, tiled=True)


def _gather_forward(shard: Array, axis: int, dtype: Any, rings: Rings) -> tuple[Array, Array]:
    return _gather(shard, axis, dtype, rings), jnp.zeros((), shard.dtype)


def _gather_backward(axis: int, dtype: Any, rings: Rings, like: Any, gradient: Array) -> tuple[Array]:
    # The devices' gradients are of the compute type; their sum is not rounded to it.
    total = gradient.astype(jnp.float32)
    for ring in rings:  # the compiler has no reduce-scatter over several axes of a torus: it would reduce the whole
        groups = ring if len(rings) > 1 else None
        total = jax.lax.psum_scatter(total, "fsdp", scatter_dimension=axis, axis_index_groups=groups, tiled=True)
    return (total.astype(like.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


def sharded(tree: PyTree, specs: PyTree, dtype: Any, rings: Rings) -> PyTree:
    """The tree with a `Shard` in place of each array that its spec splits over `fsdp`."""

    def box(array: Any, spec: P) -> Any:
        return Shard(array, tuple(spec).index("fsdp"), jnp.dtype(dtype), rings) if "fsdp" in tuple(spec) else array

    return jax.tree.map(box, tree, specs)


def gathered(params: PyTree, inputs: PyTree, names: Container[str] | None = None) -> tuple[PyTree, PyTree]:
    """A block's parameters, with those that are trained put together, and its inputs.

    In the backward pass the gradients of both are there before either continues. The compiler would put off those of
    weights, which nothing waits for, to the end of the step, and keep until then all that they are made of.

    Args:
        names: of the arrays that are trained; None: all are.
    """
    leaves, tree = jax.tree.flatten_with_path(params, is_leaf=_is_shard)
    arrays = [leaf for _, leaf in leaves]
    places = [place for place, (path, _) in enumerate(leaves) if names is None or path[-1].key in names]
    if not places:
        return params, inputs
    whole, inputs = _together(meta.unbox([arrays[place] for place in places]), inputs)
    for place, array in zip(places, whole, strict=True):
        arrays[place] = array
    return jax.tree.unflatten(tree, arrays), inputs


@jax.custom_vjp
def _together(weights: PyTree, inputs: PyTree) -> tuple[PyTree, PyTree]:
    return weights, inputs


_together.defvjp(lambda *both: (both, None), lambda _, gradients: jax.lax.optimization_barrier(gradients))


def on_mesh(gradient: Gradient, mesh: Mesh, rules: Sequence[Rule], dtypes: Mapping[str, Any]) -> Gradient:
    """The gradient of a batch that is split over the mesh, from that of a device's part of it.

    The loss must be a mean over the examples; the parameters' gradients come out split as the parameters are.

    Args:
        gradient: takes weights as Flax modules do, with `Shard`s among them.
        rules: by which the parameters are split, those of their networks.
        dtypes: the type that each part of the parameters computes in.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]

    def mean(value: Any) -> Array:
        # A shard's is summed over `fsdp` already.
        total = _sum(mesh, value.value, ("data",)) if _is_shard(value) else _sum(mesh, value, sharding.BATCH[0])
        return total / parts

    def of_device(*arguments: Any) -> tuple[Loss, PyTree]:
        loss, gradients = gradient(*arguments)
        return mean(loss), jax.tree.map(mean, gradients, is_leaf=_is_shard)

    return _on_devices(of_device, mesh, rules, dtypes, lambda param_specs: (P(), param_specs))


def sums_on_mesh(
    function: Callable[..., PyTree], mesh: Mesh, rules: Sequence[Rule], dtypes: Mapping[str, Any]
) -> Callable[..., PyTree]:
    """(params, frozen, batch, …) → sums over a batch that is split over the mesh, from those of a device's part of it.

    Args:
        function, rules, dtypes: as those of `on_mesh`; what follows the batch is the same on all devices.
    """
    return _on_devices(
        lambda *arguments: _sum(mesh, function(*arguments), sharding.BATCH[0]), mesh, rules, dtypes, lambda _: P()
    )


def _sum(mesh: Mesh, tree: PyTree, axes: tuple[str, ...]) -> Any:
    """The sum over axes of the mesh; where these are of one device, there may be no such axes to sum over."""
    return jax.lax.psum(tree, axes) if any(mesh.shape[axis] > 1 for axis in axes) else tree


def _on_devices(
    function: Callable[..., Any],
    mesh: Mesh,
    rules: Sequence[Rule],
    dtypes: Mapping[str, Any],
    out_specs: Callable[[PyTree], PyTree],
) -> Callable[..., Any]:
    """The function on each device, of its own examples and of `Shard`s; `out_specs` takes the parameters' specs."""
    manual = frozenset(axis for axis in mesh.axis_names if axis != "tensor" or mesh.shape[axis] == 1)
    rings = sharding.rings(mesh)

    def boxed(params: PyTree, specs: PyTree) -> PyTree:
        return {part: sharded(params[part], specs[part], dtypes[part], rings) for part in params}

    def on_devices(params: PyTree, frozen: PyTree, batch: PyTree, *others: Any) -> Any:
        param_specs, frozen_specs = (sharding.specs(mesh, rules, tree) for tree in (params, frozen))

        def on_device(params: PyTree, frozen: PyTree, *others: Any) -> Any:
            return function(boxed(params, param_specs), boxed(frozen, frozen_specs), *others)

        if mesh.shape["data"] * mesh.shape["fsdp"] == 1 and "tensor" not in manual:
            # `tensor` alone is the compiler's; inside of a shard_map of axes of one device it fails over their sums.
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # by which attention and sequences split
                return function(params, frozen, batch, *others)
        manual_specs = [jax.tree.map(lambda spec: _only(spec, manual), specs) for specs in (param_specs, frozen_specs)]
        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(*manual_specs, sharding.BATCH, *(P() for _ in others)),
            out_specs=out_specs(manual_specs[0]),
            axis_names=manual,
            check_vma=False,
        )(params, frozen, batch, *others)

    return on_devices


def _is_shard(value: Any) -> bool:
    return isinstance(value, Shard)


def _only(spec: P, axes: frozenset[str]) -> P:
    """The spec without the axes that the compiler takes care of."""
    return P(*(axis if axis in axes else None for axis in spec))
