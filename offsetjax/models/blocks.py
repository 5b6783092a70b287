"""What a network says of its own blocks.

Rematerialisation, loops over layers and FSDP's gathering need to know which modules of a network repeat, which attend,
and which are worth computing again. A network declares them once, as `Blocks`, and wraps its `apply` in
`tracing.traced`: a module of any library then gets all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import flax.linen as nn

Modules = tuple[type[nn.Module], ...]


@dataclass(frozen=True)
class Blocks:
    """The kinds of modules that a network is made of.

    Attributes:
        attention: those that attend, with their projections.
        blocks: those that are computed one after the other: of each, FSDP gathers the weights before it begins.
        stages: those that hold several blocks.
        repeated: (a module) → the modules alike, itself among them, that follow upon each other, each taking what the
            one before gives; none where it stands alone.
    """

    attention: Modules = ()
    blocks: Modules = ()
    stages: Modules = ()
    repeated: Callable[[nn.Module], Sequence[nn.Module]] = lambda module: ()

    def recomputed(self, policy: str) -> Modules:
        """The modules that a policy of `model.remat` has computed again."""
        return {
            "none": (),
            "attention": self.attention,
            "blocks": self.blocks,
            "full": (*self.blocks, *self.stages),
        }[policy]
