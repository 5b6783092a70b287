"""The text encoder: `init` and `apply` of CLIP's transformer (`clip.py`), and its `config.json`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from offsetjax.models.blocks import Blocks
from offsetjax.models.clip import ClipConfig, ClipLayer, ClipLayers, ClipText
from offsetjax.models.tracing import PLAIN, Tracing, traced
from offsetjax.parallel.sharding import split_layers

# What transformers' config.json has beyond the architecture. With `eos_token_id = 2`, as in the published checkpoints,
# transformers takes the greatest id of a caption for the end of its text, whatever the size of the vocabulary.
_FIXED = {
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dtype": "float32",
    "eos_token_id": 2,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "model_type": "clip_text_model",
    "pad_token_id": 1,
    "transformers_version": "4.57.6",  # whose form of file this is
}


def _repeated(module: nn.Module) -> Sequence[nn.Module]:
    is_one = isinstance(module, ClipLayer) and isinstance(module.parent, ClipLayers)
    return module.parent.layers[:-1] if is_one else ()  # type: ignore[union-attr]  # the last one's input is read too


_BLOCKS = Blocks(repeated=_repeated)


@dataclass(frozen=True)
class TextEncoder:
    """`init` and `apply`; `config` has transformers' names and values.

    Attributes:
        is_penultimate: the hidden states are those before the last layer, without the final layer norm (SDXL); by
            default those of the last layer after it.
        has_projection: the caption as a whole is given as well, projected (SDXL's second encoder).
        tracing: how `apply` is traced in training.
    """

    config: Mapping[str, Any]
    dtype: jnp.dtype
    is_penultimate: bool = False
    has_projection: bool = False
    tracing: Tracing = PLAIN
    sharding: ClassVar = split_layers("q_proj|k_proj|v_proj|fc1", "out_proj|fc2")

    @property
    def class_name(self) -> str:
        """The class that PyTorch transformers reads the weights with."""
        return "CLIPTextModelWithProjection" if self.has_projection else "CLIPTextModel"

    def _module(self) -> ClipText:
        return ClipText(ClipConfig(**self.config), self.dtype, self.is_penultimate, self.has_projection)

    def init(self, key: Key[Array, ""]) -> PyTree:
        """Random float32 parameters."""
        return self._module().init(key, jnp.zeros((1, 1), jnp.int32))["params"]

    def apply(
        self, params: PyTree, input_ids: Int[Array, "b n"]
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b p"] | None]:
        """The hidden states of the tokens and, with `has_projection`, the projected state of the end of the text."""
        with traced(_BLOCKS, self.tracing):
            output: Any = self._module().apply({"params": params}, jnp.asarray(input_ids))
        return output

    def torch_config(self) -> dict[str, Any]:
        """The `config.json` that transformers reads."""
        return dict(sorted({**self.config, **_FIXED, "architectures": [self.class_name]}.items()))
