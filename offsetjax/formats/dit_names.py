"""A DiT's tensors as diffusers' `DiTTransformer2DModel` has them: the embedding of time and class once in each block.

emb.timestep_embedder.linear_1.weight  ↔  transformer_blocks.<each>.norm1.emb.timestep_embedder.linear_1.weight
"""

import re
from collections.abc import Mapping

import numpy as np

from offsetjax.errors import UserError
from offsetjax.formats.tensors import Tensor

_OF_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.norm1\.(emb\..*)")


def to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ours, with a copy for each block."""
    blocks = {match[1] for name in tensors if (match := re.match(r"transformer_blocks\.(\d+)\.", name))}
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        copies = [f"transformer_blocks.{block}.norm1.{name}" for block in sorted(blocks, key=int)]
        result |= dict.fromkeys(copies if name.startswith("emb.") else [name], tensor)
    return result


def from_diffusers(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """One of the copies, as ours.

    Args:
        where: what an error begins with.

    Raises:
        UserError: they are not the same, as those of a model that PyTorch trained further are not.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _OF_BLOCK.fullmatch(name)
        own = match[2] if match else name
        if own in result and not np.array_equal(result[own](), tensor()):
            raise UserError(
                f"{where}: {name} is not the same in all blocks, which a DiT of ours cannot hold; give another"
            )
        result[own] = tensor
    return result
