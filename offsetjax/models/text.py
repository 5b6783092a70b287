"""The text encoder, transformers' Flax CLIP."""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree
from transformers import CLIPTextConfig, FlaxCLIPTextModel, FlaxCLIPTextModelWithProjection

from offsetjax.models.intercept import torch_numerics
from offsetjax.models.scan import scanned

# As in the published checkpoints: with `eos_token_id = 2`, transformers takes the greatest id of a caption for the
# end of its text, whatever the size of the vocabulary.
_MARKS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class TextEncoder:
    """`init` and `apply`; `config` has transformers' names and values.

    Attributes:
        is_penultimate: the hidden states are those before the last layer, without the final layer norm (SDXL); else
            those of the last layer after it.
        has_projection: the caption as a whole is given as well, projected (SDXL's second encoder).
        is_scanned: whether the layers are one loop (`scan.py`).
    """

    config: Mapping[str, Any]
    dtype: jnp.dtype
    is_penultimate: bool = False
    has_projection: bool = False
    is_scanned: bool = False

    @property
    def class_name(self) -> str:
        """The class that PyTorch transformers reads the weights with."""
        return "CLIPTextModelWithProjection" if self.has_projection else "CLIPTextModel"

    def _module(self) -> nn.Module:
        flax_class = FlaxCLIPTextModelWithProjection if self.has_projection else FlaxCLIPTextModel
        return flax_class.module_class(CLIPTextConfig(**self.config, **_MARKS), dtype=self.dtype)

    def _inputs(self, input_ids: Int[Array, "b n"]) -> tuple[Array, Array, Array]:
        # Stable Diffusion lets the padding be attended to: its mask is the causal one alone.
        positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        return input_ids, jnp.ones_like(input_ids), positions

    def init(self, key: Key[Array, ""]) -> PyTree:
        """Random float32 parameters."""
        with torch_numerics():
            return self._module().init(key, *self._inputs(jnp.zeros((1, 1), jnp.int32)))["params"]

    def apply(
        self, params: PyTree, input_ids: Int[Array, "b n"]
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b p"] | None]:
        """The hidden states of the tokens and, with `has_projection`, the projected state of the end of the text."""
        module, variables = self._module(), {"params": params}
        inputs = self._inputs(jnp.asarray(input_ids))
        with scanned() if self.is_scanned else nullcontext(), torch_numerics():
            output: Any = module.apply(variables, *inputs, output_hidden_states=self.is_penultimate)
            hidden = output.hidden_states[-2] if self.is_penultimate else output.last_hidden_state
            if not self.has_projection:
                return hidden.astype(self.dtype), None
            # Flax takes the end of each text from all texts at once, for which the devices would have to exchange them.
            end = jnp.argmax(input_ids, axis=1)[:, None, None]
            pooled = jnp.take_along_axis(output.last_hidden_state, end, axis=1)[:, 0]
            projected: Any = module.apply(variables, pooled, method=_project)
        return hidden.astype(self.dtype), projected

    def torch_config(self) -> dict[str, Any]:
        """The `config.json` that transformers reads."""
        config = CLIPTextConfig(**self.config, **_MARKS, architectures=[self.class_name], torch_dtype="float32")
        return json.loads(config.to_json_string())


def _project(module: Any, pooled: Float[Array, "b d"]) -> Float[Array, "b p"]:
    return module.text_projection(pooled)
