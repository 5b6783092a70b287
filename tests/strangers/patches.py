"""A family that offsetjax does not know: patches of pixels as latents, two encoders of unlike lengths, a transformer.

What makes it one is `FAMILY` and the sections of its parts' architectures; an installed package would name them as
entry points, as the test does.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from offsetjax.config import default_config, flatten
from offsetjax.config.field import Field, Section
from offsetjax.config.ranges import count
from offsetjax.config.settings import Settings
from offsetjax.models.attention import attend
from offsetjax.models.blocks import Blocks
from offsetjax.models.family import Captions, Family, Files, Tokenizing
from offsetjax.models.tracing import PLAIN, Tracing, traced
from offsetjax.parallel.sharding import split_layers
from tests import tiny

NUM_COLOURS, SIDE = 3, 2  # of a patch
LENGTHS = {"words": 4, "letters": 9}
TRANSFORMER = Section(
    "model.transformer",
    "A transformer over latent pixels.",
    (
        Field("width", int, 16, count(1), "of the states"),
        Field("num_layers", int, 3, count(1), "that follow upon each other"),
        Field("sample_size", int, 8, count(1), "of the latents' side"),
    ),
)
PATCHES = Section("model.patches", "Pixels to latents.", (Field("side", int, SIDE, count(1), "of a patch"),))
WORDS = Section("model.words", "Whole words.", (Field("vocabulary", int, 64, count(2), "different words"),))
LETTERS = Section("model.letters", "Letters.", (Field("vocabulary", int, 128, count(2), "different letters"),))


class Attention(nn.Module):
    width: int
    kernel: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        dense = partial(nn.Dense, self.width, use_bias=False, dtype=self.dtype)
        query, key, value = dense(name="to_q")(x), dense(name="to_k")(context), dense(name="to_v")(context)
        return dense(name="to_out_0")(attend(query, key, value, 2, kernel=self.kernel))


class Layer(nn.Module):
    width: int
    kernel: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, text: jax.Array) -> jax.Array:
        normalised = nn.LayerNorm(dtype=self.dtype, name="norm")(x)
        context = jnp.concatenate([normalised, text], axis=1)
        x = x + Attention(self.width, self.kernel, self.dtype, name="attention")(normalised, context)
        return x + nn.Dense(self.width, dtype=self.dtype, name="mlp")(nn.gelu(x))


class Transformer(nn.Module):
    width: int
    num_layers: int
    channels: int
    kernel: str
    dtype: Any

    def setup(self) -> None:
        self.proj_in = nn.Dense(self.width, dtype=self.dtype)
        self.time = nn.Dense(self.width, dtype=self.dtype)
        self.text = nn.Dense(self.width, dtype=self.dtype)
        self.layers = [Layer(self.width, self.kernel, self.dtype) for _ in range(self.num_layers)]
        self.proj_out = nn.Dense(self.channels, dtype=self.dtype)

    def __call__(self, latents: jax.Array, timesteps: jax.Array, text: jax.Array, mask: jax.Array) -> jax.Array:
        b, c, h, w = latents.shape
        x = self.proj_in(jnp.moveaxis(latents, 1, -1).reshape(b, h * w, c))
        x = x + self.time(jnp.stack([jnp.sin(timesteps / 50), timesteps / 1000], axis=-1))[:, None]
        text = self.text(text) * mask[..., None]
        for layer in self.layers:
            x = layer(x, text)
        return jnp.moveaxis(self.proj_out(x).reshape(b, h, w, c), -1, 1)


BLOCKS = Blocks(
    attention=(Attention,),
    blocks=(Layer,),
    repeated=lambda module: module.parent.layers if isinstance(module.parent, Transformer) else (),
)


@dataclass(frozen=True)
class Denoiser:
    config: Mapping[str, Any]
    dtype: Any
    tracing: Tracing = PLAIN
    class_name: str = "PatchTransformer"
    sharding: ClassVar = split_layers("to_q|to_k|to_v", "to_out_0")

    def _module(self) -> Transformer:
        channels = NUM_COLOURS * SIDE**2
        return Transformer(self.config["width"], self.config["num_layers"], channels, self.tracing.kernel, self.dtype)

    def attention_lengths(self, latent_pixels: int) -> tuple[int, ...]:
        return (latent_pixels,)

    def init(self, key: jax.Array) -> Any:
        latents, text = jnp.zeros((1, NUM_COLOURS * SIDE**2, 1, 1)), jnp.zeros((1, 1, self.config["width"]))
        return self._module().init(key, latents, jnp.zeros(1), text, jnp.ones((1, 1)))["params"]

    def apply(
        self, params: Any, latents: jax.Array, timesteps: jax.Array, text: jax.Array, mask: jax.Array
    ) -> jax.Array:
        with traced(BLOCKS, self.tracing):
            output = self._module().apply({"params": params}, latents.astype(self.dtype), timesteps, text, mask)
        return output.astype(jnp.float32)

    def torch_config(self) -> dict[str, Any]:
        return {"_class_name": self.class_name, **self.config}


@dataclass(frozen=True)
class Patches:
    """Each square of pixels is a latent pixel: what is trained is that nothing is."""

    config: Mapping[str, Any]
    dtype: Any = jnp.float32
    class_name: str = "Patches"
    scaling_factor: float = 1.0

    @property
    def downscale(self) -> int:
        return self.config["side"]

    @property
    def latent_channels(self) -> int:
        return NUM_COLOURS * self.downscale**2

    def init(self, key: jax.Array) -> Any:
        del key
        return {"gain": {"kernel": jnp.eye(self.latent_channels)}}

    def encode(self, params: Any, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        b, c, h, w = pixels.shape
        s = self.downscale
        latents = pixels.reshape(b, c, h // s, s, w // s, s).transpose(0, 1, 3, 5, 2, 4)
        latents = latents.reshape(b, c * s * s, h // s, w // s)
        kernel = nn.meta.unbox(params)["gain"]["kernel"]
        return jnp.einsum("bchw,cd->bdhw", latents, kernel), jnp.full_like(latents, -60.0)

    def decode(self, params: Any, latents: jax.Array) -> jax.Array:
        b, _, h, w = latents.shape
        s = self.downscale
        pixels = latents.reshape(b, NUM_COLOURS, s, s, h, w).transpose(0, 1, 4, 2, 5, 3)
        return pixels.reshape(b, NUM_COLOURS, h * s, w * s)

    def torch_config(self) -> dict[str, Any]:
        return {"_class_name": self.class_name, **self.config}


@dataclass(frozen=True)
class Embedding:
    """One vector for each token."""

    config: Mapping[str, Any]
    dtype: Any
    tracing: Tracing = PLAIN
    class_name: str = "Embedding"

    def _module(self) -> nn.Embed:
        return nn.Embed(self.config["vocabulary"], self.config["width"], dtype=self.dtype)

    def init(self, key: jax.Array) -> Any:
        return {"table": self._module().init(key, jnp.zeros((1, 1), jnp.int32))["params"]}

    def apply(self, params: Any, ids: jax.Array) -> jax.Array:
        return self._module().apply({"params": params["table"]}, ids)

    def torch_config(self) -> dict[str, Any]:
        return {"_class_name": self.class_name, **self.config}


@dataclass(frozen=True)
class Tokenizer:
    """0 fills a caption up; a word, or a letter, is a hash of itself."""

    by_word: bool
    vocabulary: int
    length: int

    def __call__(self, caption: str) -> tuple[np.ndarray, int]:
        parts = caption.split() if self.by_word else list(caption)
        ids = [1 + sum(map(ord, part)) % (self.vocabulary - 1) for part in parts]
        return np.array((ids + [0] * self.length)[: self.length], np.int32), len(ids)


def save(tokenizer: Tokenizer, folder: epath.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(vars(tokenizer)))


def load(folder: epath.Path) -> Tokenizer:
    return Tokenizer(**json.loads((folder / "tokenizer.json").read_text()))


def new(model: Any, captions: Sequence[str]) -> dict[str, Tokenizer]:
    del captions
    return {part: Tokenizer(part == "words", model[part].vocabulary, length) for part, length in LENGTHS.items()}


def build(model: Any, dtype: Any) -> dict[str, Any]:
    width = {"width": model.transformer.width}
    encoders = {part: Embedding({**model[part].to_dict(), **width}, dtype) for part in LENGTHS}
    return {
        "transformer": Denoiser(model.transformer.to_dict(), dtype),
        "patches": Patches(model.patches.to_dict()),
        **encoders,
    }


def condition(parts: Mapping[str, Any], params: Mapping[str, Any], captions: Captions, model: Any) -> dict[str, Any]:
    """Both encodings one after the other along the sequence, with a mask of what fills them up."""
    del model
    ids = captions.input_ids
    text = jnp.concatenate([parts[part].apply(params[part], ids[part]) for part in LENGTHS], axis=1)
    mask = jnp.concatenate([ids[part] != 0 for part in LENGTHS], axis=1)
    return {"text": text, "mask": mask.astype(text.dtype)}


FAMILY = Family(
    name="patches",
    title="transformer over patches",
    denoiser="transformer",
    autoencoder="patches",
    encoders=tuple(LENGTHS),
    build=build,
    condition=condition,
    latents=lambda values: (NUM_COLOURS * values["model.patches.side"] ** 2, values["model.patches.side"]),
    resolution_unit=lambda model, parts: model.patches.side,
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "mlp"),
    text_encoder_lora_targets=("none",),  # the encoders have no layers to adapt
    tokenizing=Tokenizing(
        folders={part: f"tokenizer_of_{part}" for part in LENGTHS},
        load=load,
        save=save,
        tokenize=lambda tokenizer, caption: tokenizer(caption),
        new=new,
    ),
    files=Files(
        pipeline="PatchPipeline",
        architecture=lambda predicts: "patches",
        is_directory=lambda directory: directory.has("transformer"),
        index=lambda settings: {"transformer": ["patches", "PatchTransformer"]},
    ),
)


def tiny_config(data: str, **changes: Any) -> Settings:
    """The smallest training of the family."""
    config, small = default_config(), tiny.tiny_config(data, model__family="patches", **changes)
    config.update_from_flattened_dict(
        {
            path: value
            for path, value in flatten(small)
            if not path.startswith(("model.unet", "model.vae", "model.text", "lora.targets", "lora.text"))
        }
    )
    return config
