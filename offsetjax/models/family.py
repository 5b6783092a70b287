"""What a family of models is: everything in which one latent diffusion model differs from another, in one object.

A family names its parts as the folders of its checkpoints are named, and says which of them denoises, which encodes
pictures and which encode captions. All else in the package asks a `Family`, and never for a name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from etils import epath
from jaxtyping import Array, Bool, Float, Int, Key, PyTree
from ml_collections import ConfigDict

from offsetjax.config import flatten
from offsetjax.config.families import FAMILIES, family_of_values
from offsetjax.formats.lora_names import Kohya
from offsetjax.formats.pretrained import Pretrained, open_pretrained

__all__ = [
    "FAMILIES",
    "Captions",
    "Conditions",
    "Family",
    "Files",
    "Ids",
    "Network",
    "Tokenizing",
    "Tokens",
    "Values",
    "family_of",
    "latents_of",
    "open_checkpoint",
]

# Token ids by text encoder; of one caption [n], or of a batch [b, n]. Each encoder has a length n of its own.
Ids = Mapping[str, Array | np.ndarray]
# What the denoiser's `apply` takes beside latents and timesteps, by the names of its arguments.
Conditions = Mapping[str, PyTree]


@runtime_checkable
class Network(Protocol):
    """A part of a model: pure `init` and `apply`, without weights.

    An autoencoder has `encode`, `decode`, `downscale`, `latent_channels` and `scaling_factor`; it may name those of its
    parameters that latents depend on, as `encoder_params`, and has `standardised` where its latents can be.
    One whose layers can be split over the mesh axis `tensor` says so as `sharding`, rules of `parallel.sharding`.

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


Values = Mapping[str, Any]  # of a config's section `model`, by path, as `model.family`


@dataclass(frozen=True)
class Tokenizing:
    """How a family's captions become ids; a tokenizer may be of any type.

    Attributes:
        folders: of each text encoder's tokenizer, in a checkpoint.
        load: (folder) → a tokenizer.
        save: (tokenizer, folder).
        fit: (tokenizer, its encoder's section of the config) → the tokenizer as the encoder can read it; raises a
            ValueError that says what is wrong.
        tokenize: (tokenizer, caption) → its ids [n], padded or cut to the encoder's length, and how many there were.
        new: (the config's `model`, captions to learn from) → tokenizers by encoder, for a model made from scratch.
        published: (the config's `model`) → those that every model of the family has, for a checkpoint that brings
            none; None where there are none.
    """

    folders: Mapping[str, str]
    load: Callable[[epath.Path], Any]
    save: Callable[[Any, epath.Path], None]
    tokenize: Callable[[Any, str], tuple[Int[np.ndarray, " n"], int]]
    new: Callable[[ConfigDict, Sequence[str]], dict[str, Any]]
    published: Callable[[ConfigDict], dict[str, Any] | None] = lambda model: None
    fit: Callable[[Any, ConfigDict], Any] = lambda tokenizer, encoder: tokenizer


@dataclass(frozen=True)
class Files:
    """What a family is in the files of other programs.

    Attributes:
        is_directory: whether a diffusers directory is of the family.
        required: by part, or `scheduler`, what its `config.json` may say of things that the networks do not vary.
        by_default: by part, what a `config.json` means that does not say it.
        unread: the paths of fields that no network depends on: a preset's value gives way to the checkpoint's.
        pipeline: the class that loads an exported directory.
        index: (the settings of the config's `model`) → the entries of `model_index.json` but for the scheduler's.
        said_by_index: fields of the config's `model` that `model_index.json` says, and what it means that does not.
        architecture: (what the network predicts) → `modelspec.architecture`.
        kohya: what the family is to kohya's scripts, whose LoRAs most programs read.
        original: where the original code is, for `modelspec.implementation` of a single file; empty: it has no such
            layout.
    """

    pipeline: str
    architecture: Callable[[str], str]
    is_directory: Callable[[Any], bool] = lambda directory: False
    required: Mapping[str, Mapping[str, tuple[Any, ...]]] = field(default_factory=dict)
    by_default: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    index: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda settings: {}
    said_by_index: Mapping[str, bool] = field(default_factory=dict)
    kohya: Kohya = field(default_factory=Kohya)
    original: str = ""


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        name: the word in `model.family`.
        title: for people.
        denoiser, autoencoder, encoders: the names of its parts; the encoders are those of captions, in order. The
            architecture of each is a section of the config, `model.NAME` (`config.schema.SECTIONS`).
        build: (the config's `model`, compute type) → its networks by part.
        condition: (networks, their parameters, the captions, the config's `model`) → conditions, where parameters are
            as each network's `apply` takes them.
        latents: (values) → the channels of the latents, and how many pixels a latent pixel is on a side.
        resolution_unit: (the config's `model`, parts) → what pictures' sides must be a multiple of for these networks.
        is_like: (values) whether a config that names no family has this architecture.
        check: (the config's `model`) raises a UserError unless its parts go together.
        preset: sets a config's `model` to the published architecture.
        encodes_in_half: whether pictures may be encoded in the compute type during training.
        lora_targets, text_encoder_lora_targets: what `lora.targets` and `lora.text_encoder_targets` are by default:
            ends of diffusers' names of the layers of the denoiser, and of the encoders, that adapters go to.
        unread: (the config's `model`) → what the paths begin with of parameters that no loss depends on: they have no
            gradient, and get no weight decay.
    """

    name: str
    title: str
    denoiser: str
    autoencoder: str
    encoders: tuple[str, ...]
    build: Callable[[ConfigDict, Any], dict[str, Any]]
    condition: Callable[[Mapping[str, Any], Mapping[str, PyTree], Captions, Mapping[str, Any]], Conditions]
    latents: Callable[[Values], tuple[int, int]]
    resolution_unit: Callable[[ConfigDict, Sequence[str]], int]
    tokenizing: Tokenizing
    files: Files
    is_like: Callable[[Values], bool] = lambda values: False
    check: Callable[[ConfigDict], None] = lambda model: None
    preset: Callable[[ConfigDict], None] = lambda config: None
    encodes_in_half: bool = False
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    text_encoder_lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj")
    unread: Callable[[ConfigDict], tuple[str, ...]] = lambda model: ()

    @property
    def parts(self) -> tuple[str, ...]:
        """All parts, the denoiser first."""
        return (self.denoiser, self.autoencoder, *self.encoders)


def family_of(model: ConfigDict) -> Family:
    """The family that the section `model` of a config names, or else the one whose architecture it has.

    Raises:
        UserError: no family has that name.
    """
    return family_of_values(_values(model))


def latents_of(model: ConfigDict) -> tuple[int, int]:
    """The channels of a model's latents, and how many pixels a latent pixel is on a side."""
    return family_of(model).latents(_values(model))


def _values(model: ConfigDict) -> Values:
    return {f"model.{path}": value for path, value in flatten(model)}


def open_checkpoint(path: epath.PathLike, variant: str = "") -> Pretrained:
    """Opens a diffusers directory of any family that is known, or a single file; see `formats.pretrained`."""
    families = {name: FAMILIES[name] for name in FAMILIES.names}
    parts = tuple(dict.fromkeys(part for family in families.values() for part in family.parts))
    return open_pretrained(path, variant, {name: each.files.is_directory for name, each in families.items()}, parts)
