"""Pictures from prompts: encode the prompt → draw the start noise → DDIM → decode. One jitted function."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8
from ml_collections import ConfigDict
from PIL import Image, ImageDraw

from offsetjax.config import validate
from offsetjax.diffusion.noise import batch_noise
from offsetjax.diffusion.sampler import ddim
from offsetjax.diffusion.schedule import make_schedule
from offsetjax.errors import UserError
from offsetjax.models.pipeline import Pipeline
from offsetjax.random import stream_key
from offsetjax.workdir import load_trained

_log = logging.getLogger("offsetjax")

_BATCH = 16  # pictures drawn at once
Sampler = Callable[..., UInt8[Array, "b H W 3"]]
PixelSampler = Callable[..., Float[Array, "b 3 H W"]]


@dataclass(frozen=True)
class Picture:
    """One sample: `image` uint8 [H, W, 3]; `brightness` is the mean of all values, 0 black and 1 white."""

    prompt: str
    seed: int
    image: np.ndarray

    @property
    def brightness(self) -> float:
        return float(self.image.mean() / 255.0)


def make_sampler(pipeline: Pipeline, config: ConfigDict, mesh: Mesh | None = None) -> Sampler:
    """A jitted `(params, frozen, input_ids [b, n], negative_ids [n], keys [b]) → pictures uint8 [b, H, W, 3]`.

    The start is drawn from the noise of training (`sample.start_noise = "matched"`) or is plain.
    """
    draw = pixel_sampler(pipeline, config)

    def draw_levels(
        params: PyTree, frozen: PyTree, input_ids: Array, negative_ids: Array, keys: Key[Array, " b"]
    ) -> UInt8[Array, "b H W 3"]:
        pixels = draw(params, frozen, input_ids, negative_ids, start_noise(pipeline, config, keys))
        return jnp.transpose(jnp.round(pixels * 255.0).astype(jnp.uint8), (0, 2, 3, 1))

    return jax.jit(draw_levels, out_shardings=NamedSharding(mesh, P()) if mesh else None)


def start_noise(pipeline: Pipeline, config: ConfigDict, keys: Key[Array, " b"]) -> Float[Array, "b c h w"]:
    """The `x_T` that sampling starts from, one for each key, by `sample.start_noise`."""
    size = config.data.resolution // pipeline.vae.downscale
    strength = config.noise.offset_strength if config.sample.start_noise == "matched" else 0.0
    return batch_noise(keys, (pipeline.vae.config["latent_channels"], size, size), strength)


def pixel_sampler(pipeline: Pipeline, config: ConfigDict) -> PixelSampler:
    """The pure `(params, frozen, input_ids [b, n], negative_ids [n], start [b, c, h, w]) → pixels in [0, 1]`."""
    schedule, sample = make_schedule(**config.schedule), config.sample

    def draw(
        params: PyTree,
        frozen: PyTree,
        input_ids: Int[Array, "b n"],
        negative_ids: Int[Array, " n"],
        start: Float[Array, "b c h w"],
    ) -> Float[Array, "b 3 H W"]:
        count = len(input_ids)
        guided = sample.guidance_scale != 1.0
        ids = jnp.concatenate([jnp.broadcast_to(negative_ids, input_ids.shape), input_ids]) if guided else input_ids
        hidden = pipeline.text_encoder.apply(frozen["text_encoder"], ids)

        def denoiser(noisy, timestep):
            inputs = jnp.concatenate([noisy, noisy]) if guided else noisy
            prediction = pipeline.unet.apply(params, inputs, jnp.full(len(inputs), timestep), hidden)
            if not guided:
                return prediction
            unconditional, conditional = prediction[:count], prediction[count:]
            return unconditional + sample.guidance_scale * (conditional - unconditional)

        latents = ddim(denoiser, schedule, start, sample.num_steps, sample.spacing)
        pixels = pipeline.vae.decode(frozen["vae"], latents / pipeline.vae.config["scaling_factor"])
        return jnp.clip(pixels / 2.0 + 0.5, 0.0, 1.0)

    return draw


def draw_pictures(
    sampler: Sampler,
    pipeline: Pipeline,
    config: ConfigDict,
    params: PyTree,
    frozen: PyTree,
    prompts: Sequence[str],
    seeds: Sequence[int],
) -> list[Picture]:
    """A picture for each prompt and seed; one seed starts from the same noise for every prompt."""
    requests = [(prompt, seed) for prompt in prompts for seed in seeds]
    negative_ids = pipeline.tokenize([config.sample.negative_prompt])[0]
    key = stream_key(config.seed, "sample")
    pictures: list[Picture] = []
    for begin in range(0, len(requests), _BATCH):
        chunk = requests[begin : begin + _BATCH]
        # The last chunk is filled up so that one compiled program serves all.
        padded = chunk + [chunk[-1]] * (min(_BATCH, len(requests)) - len(chunk))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray([seed for _, seed in padded], jnp.uint32))
        input_ids = pipeline.tokenize([prompt for prompt, _ in padded])
        images = jax.device_get(sampler(params, frozen, input_ids, negative_ids, keys))
        pictures += [Picture(prompt, seed, image) for (prompt, seed), image in zip(chunk, images, strict=False)]
    return pictures


def write_samples(directory: epath.PathLike, name: str, pictures: Sequence[Picture], about: Mapping[str, Any]) -> None:
    """Writes `name.png`, a row a prompt and a column a seed, and `name.json` with each picture's brightness."""
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    records = [{"prompt": p.prompt, "seed": p.seed, "brightness": round(p.brightness, 5)} for p in pictures]
    write_png(directory / f"{name}.png", grid(pictures))
    (directory / f"{name}.json").write_text(json.dumps({**about, "records": records}, indent=1) + "\n")


def about_samples(config: ConfigDict, step: int, params: str) -> dict[str, Any]:
    """How pictures were drawn, for the record beside them."""
    keys = ("start_noise", "guidance_scale", "num_steps", "spacing")
    return {"step": step, "params": params, **{key: config.sample[key] for key in keys}}


def sample_workdir(
    workdir: epath.PathLike,
    out: epath.PathLike,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    step: int | None = None,
    params: str | None = None,
    name: str = "samples",
    **settings: Any,
) -> list[Picture]:
    """Draws from a work directory's checkpoint into `out`: `NAME.png`, `NAME.json` and each picture's own PNG.

    Args:
        settings: replace fields of the config's `sample`, such as `start_noise="plain"`.

    Raises:
        UserError: the checkpoint cannot be read, or a setting is out of range.
    """
    trained = load_trained(workdir, step, params)
    config = trained.config
    if config.task != "diffusion":
        raise UserError(f"sample: {workdir} is the training of an autoencoder, which draws nothing from prompts")
    config.sample.update(settings)
    validate(config)
    if bad := [seed for seed in seeds if not 0 <= seed < 2**32]:
        raise UserError(f"sample: --seed={bad[0]} must be between 0 and 2**32 - 1")
    sampler = make_sampler(trained.pipeline, config)
    pictures = draw_pictures(sampler, trained.pipeline, config, trained.params, trained.frozen, prompts, seeds)
    out = epath.Path(out)
    write_samples(out, name, pictures, about_samples(config, trained.step, trained.which))
    for index, picture in enumerate(pictures):
        write_png(out / f"{name}_{index:03}_seed_{picture.seed}.png", Image.fromarray(picture.image))
        _log.info("%s  seed %d  brightness %.3f", picture.prompt or "(no prompt)", picture.seed, picture.brightness)
    return pictures


def grid(pictures: Sequence[Picture]) -> Image.Image:
    """The pictures, a row a prompt, each row under its prompt."""
    rows: dict[str, list[Picture]] = {}
    for picture in pictures:
        rows.setdefault(picture.prompt, []).append(picture)
    height, width = pictures[0].image.shape[:2]
    gap, text = 4, 16
    columns = max(len(row) for row in rows.values())
    canvas = Image.new("RGB", (columns * (width + gap) - gap, len(rows) * (height + gap + text) - gap), "white")
    ink = ImageDraw.Draw(canvas)
    for y, (prompt, row) in enumerate(rows.items()):
        top = y * (height + gap + text)
        ink.text((1, top + 1), prompt or "(no prompt)", fill="black")
        for x, picture in enumerate(row):
            canvas.paste(Image.fromarray(picture.image), (x * (width + gap), top + text))
    return canvas


def write_png(path: epath.Path, image: Image.Image) -> None:
    """Writes a PNG, to remote paths too."""
    with path.open("wb") as file:
        image.save(file, "PNG")
