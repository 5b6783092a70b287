"""Whether all values of a tree are finite: one answer, the same on all devices."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, PyTree

from offsetjax.parallel import sharding


def all_finite(tree: PyTree, mesh: Mesh | None = None, rules: Sequence[sharding.Rule] = ()) -> Bool[Array, ""]:
    """Whether no floating-point value of a tree is infinite or not a number.

    Args:
        mesh, rules: on which the tree lies as `sharding.specs` says: each device looks at its shards, and one exchange
            of one number makes their answers one.
    """
    if mesh is None or mesh.size == 1:
        return _all_finite([leaf for leaf in jax.tree.leaves(tree) if _is_floating(leaf)])
    placed = zip(jax.tree.leaves(tree), jax.tree.leaves(sharding.specs(mesh, rules, tree)), strict=True)
    leaves, specs = zip(*[(leaf, spec) for leaf, spec in placed if _is_floating(leaf)], strict=True)

    def on_device(*shards: Array) -> Bool[Array, ""]:
        return jax.lax.psum((~_all_finite(shards)).astype(jnp.int32), mesh.axis_names) == 0

    return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)(*leaves)


def _all_finite(arrays: Sequence[Array]) -> Bool[Array, ""]:
    # The least of all answers, by a sort. A reduction of hundreds of scalars is copied into each of the hundreds of
    # places that read the result, which takes XLA's compiler for CPUs minutes and gigabytes; a sort is not.
    answers = jnp.stack([jnp.isfinite(array).all() for array in arrays])
    return jax.lax.sort(answers.astype(jnp.int32))[0] == 1


def _is_floating(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)
