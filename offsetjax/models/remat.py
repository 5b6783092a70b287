"""Which activations are kept for the backward pass, and which are computed again, by name (`model.remat`).

- `none`: all are kept;
- `attention`: attention is computed again, with its projections;
- `blocks`: each block, of which the inputs alone are kept;
- `full`: each stage as well, with all of its blocks; the least memory, about 40 % more work.

Which modules these are is said by the network (`blocks.py`). A weight that FSDP gathers for a block is let go, and
gathered again with it. No parameter changes its name, and no number its value. A policy over a whole UNet instead would
save nothing on a TPU, where the compiler undoes it.
"""

from collections.abc import Callable, Container
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import PyTree

from offsetjax.models.blocks import Blocks
from offsetjax.parallel.fsdp import gathered


def rematerialised(blocks: Blocks, policy: str, trained: Container[str] | None = None) -> AbstractContextManager[None]:
    """A context in which the modules of a policy are traced so that the backward pass computes them again.

    Whatever the policy, a block that is no loop's has its trained weights gathered before it begins (`fsdp.gathered`).

    Args:
        blocks: of the network that is traced.
        trained: the names of the arrays that are; None: all are.
    """
    modules = blocks.recomputed(policy)

    def interceptor(next_function: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        is_bare = module.scope is None or module.scope.parent is None  # as the one below, whose call comes through here
        if not isinstance(module, (*blocks.blocks, *modules)) or context.method_name != "__call__" or is_bare:
            return next_function(*args, **kwargs)
        bare = module.clone(parent=None, name=None)

        def body(params: PyTree, inputs: tuple) -> Any:
            if isinstance(module, blocks.blocks):
                params, inputs = gathered(params, inputs, trained)
            return bare.apply({"params": params}, *inputs, **kwargs)

        return (jax.checkpoint(body) if isinstance(module, modules) else body)(module.variables["params"], args)

    return nn.intercept_methods(interceptor)
