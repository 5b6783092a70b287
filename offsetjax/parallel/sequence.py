"""Tokens split over the devices of the `tensor` axis, between the layers that the axis splits by heads and width.

Where weights stay split, each of those devices would else keep all tokens of its pictures, and norm them (Korthikanti
et al. 2022, arXiv 2205.05198). A block's inputs, which wait for the backward pass, then take a share of the memory; the
traffic stays what it was: a gather before each pair of layers and a scatter after it, for a sum over all devices.
"""

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float


def split_over_devices(x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """The same tokens, split over `tensor` where the mesh has more than one device there, and their number divides."""
    mesh = jax.sharding.get_abstract_mesh()
    if "tensor" not in mesh.axis_names or "tensor" in mesh.manual_axes or mesh.shape["tensor"] == 1:
        return x
    if x.shape[1] % mesh.shape["tensor"]:
        return x
    return jax.lax.with_sharding_constraint(x, P(P.UNCONSTRAINED, "tensor", P.UNCONSTRAINED))
