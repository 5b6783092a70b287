"""What a family of models is: everything in which one latent diffusion model differs from another, in one object.

A family names its parts as the folders of its checkpoints are named, and says which of them denoises, which encodes
pictures and which encode captions. All else in the package asks a `Family`, and never for a name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree
from ml_collections import ConfigDict

from offsetjax.registry import Registry

# Token ids by text encoder; of one caption [n], or of a batch [b, n]. Each encoder has a length n of its own.
Ids = Mapping[str, Array | np.ndarray]
# What the denoiser's `apply` takes beside latents and timesteps, by the names of its arguments.
Conditions = Mapping[str, PyTree]


class Network(Protocol):
    """A part of a model: pure `init` and `apply`, without weights.

    A text encoder's `apply` takes its parameters and ids [b, n], a denoiser's takes its parameters, latents
    [b, c, h, w], timesteps [b] and the conditions of its family by name.
    """

    @property
    def config(self) -> Mapping[str, Any]:
        """The architecture, by the names and values of its `config.json`."""

    @property
    def dtype(self) -> Any:
        """The type that it computes in."""

    @property
    def class_name(self) -> str:
        """The class that PyTorch reads its weights with."""

    def init(self, key: Key[Array, ""]) -> PyTree:
        """Random float32 parameters."""

    def torch_config(self) -> dict[str, Any]:
        """The `config.json` that PyTorch reads."""


class Tokens(NamedTuple):
    """A caption as the text encoders read it.

    Attributes:
        input_ids: by text encoder, padded or cut to its length.
        num_tokens: that the caption had before it was cut, with its marks.
        limit: how many are read. Of several encoders both are those of the one that cuts the most.
    """

    input_ids: Mapping[str, Int[np.ndarray, " n"]]
    num_tokens: int
    limit: int


class Captions(NamedTuple):
    """What a family makes the conditions of a batch of.

    Attributes:
        input_ids: by text encoder.
        is_empty: whether a caption is the empty one.
        time_ids: original height and width, crop's top and left, target height and width, in pixels.
    """

    input_ids: Ids
    is_empty: Bool[Array, " b"]
    time_ids: Float[Array, "b 6"]


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        name: the word in `model.family`.
        title: for people.
        denoiser, autoencoder, encoders: the names of its parts; the encoders are those of captions, in order.
        build: (the config's `model`, compute type) → its networks by part.
        condition: (networks, their parameters, the captions, the config's `model`) → conditions, where parameters are
            as each network's `apply` takes them.
        is_like: whether a config's `model` that names no family has this architecture.
        tokenizer_folders: the folder of each encoder's tokenizer, in a checkpoint.
        encodes_in_half: whether pictures may be encoded in the compute type during training.
    """

    name: str
    title: str
    denoiser: str
    autoencoder: str
    encoders: tuple[str, ...]
    build: Callable[[ConfigDict, Any], dict[str, Any]]
    condition: Callable[[Mapping[str, Any], Mapping[str, PyTree], Captions, Mapping[str, Any]], Conditions]
    is_like: Callable[[ConfigDict], bool] = lambda model: False
    tokenizer_folders: Mapping[str, str] = field(default_factory=dict)
    encodes_in_half: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """All parts, the denoiser first."""
        return (self.denoiser, self.autoencoder, *self.encoders)


FAMILIES: Registry[Family] = Registry(
    "model.family",
    "offsetjax.families",
    {
        "sd1": "offsetjax.models.stable_diffusion:SD1",
        "sd2": "offsetjax.models.stable_diffusion:SD2",
        "sdxl": "offsetjax.models.stable_diffusion_xl:SDXL",
    },
)


def family_of(config: ConfigDict) -> Family:
    """The family that a config names, or else the one whose architecture it has.

    Raises:
        UserError: no family has that name.
    """
    if config.model.family:
        return FAMILIES[config.model.family]
    return next(family for name in FAMILIES.names if (family := FAMILIES[name]).is_like(config.model))
