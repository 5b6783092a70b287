"""Pictures from prompts: encode the prompt → draw the start noise → solve → decode. One jitted function."""

import logging
from collections.abc import Callable, Sequence
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

from offsetjax.config import validate
from offsetjax.diffusion.noise import PLAIN, Noise, describe
from offsetjax.diffusion.noising import Noising
from offsetjax.diffusion.sampler import ANCESTRAL, coefficients, guided, mean_table, solve
from offsetjax.errors import UserError
from offsetjax.files import check_folder
from offsetjax.models.encode import encode_captions
from offsetjax.models.family import Ids
from offsetjax.models.pipeline import Pipeline, grid_shift, join
from offsetjax.models.resolve import check_resolution, resolution_unit
from offsetjax.models.task import task_of
from offsetjax.models.trained import Trained, load_trained
from offsetjax.parallel import sharding
from offsetjax.rng import stream_key
from offsetjax.sampling.pictures import Picture, write_comparison, write_samples
from offsetjax.sampling.reach import start_warning
from offsetjax.sampling.size import check_drawn_size, drawn_size

_log = logging.getLogger("offsetjax")

_BATCH, _LATENTS = 16, 64 * 64  # pictures drawn at once by a device, of so many latent pixels
PixelSampler = Callable[..., Float[Array, "b 3 H W"]]


@dataclass(frozen=True)
class Sampler:
    """`draw(params, frozen, input_ids, sampler.negative_ids, keys [b], shifts [b], step) → uint8 [b, H, W, 3]`.

    Ids are by text encoder: those of the prompts [b, n], the negative prompt's [n]. The step is the parameters', by
    which `noise.anneal` says how strong their noise is.

    Attributes:
        batch_size: pictures drawn at once.
        num_devices: which share a batch that they divide.
        tokenize: prompts' ids.
        negative_ids: of all pictures.
        brightness: the values of `sample.brightness`; each picture is drawn with each.
        seed: of the run.
    """

    draw: Callable[..., UInt8[Array, "b H W 3"]]
    batch_size: int
    num_devices: int
    tokenize: Callable[[Sequence[str]], Ids]
    negative_ids: Ids
    brightness: tuple[float, ...]
    seed: int


def make_sampler(
    pipeline: Pipeline, sample: ConfigDict, resolution: int, seed: int, mesh: Mesh | None = None
) -> Sampler:
    """The sampler of the section `sample` of a config, jitted.

    The start is drawn from the noise of training (`sample.start_noise = "matched"`) or is plain; `shifts` are values of
    `sample.brightness`, and are not read where it is empty.

    Args:
        resolution: of the training's pictures, in pixels: by default, of those that are drawn.
        mesh: a batch is split over all of its devices, and the pictures are everywhere.
    """
    pixels_of = pixel_sampler(pipeline, sample, resolution)
    shape = pipeline.latent_shape(*drawn_size(sample, resolution))
    num_devices = mesh.size if mesh else 1

    def split(array: Array) -> Array:
        if mesh is None or len(array) % num_devices:
            return array
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, sharding.BATCH))

    def draw(
        params: PyTree,
        frozen: PyTree,
        input_ids: Ids,
        negative_ids: Ids,
        keys: Key[Array, " b"],
        shifts: Float[Array, " b"],
        step: Int[Array, ""] | None = None,
    ) -> UInt8[Array, "b H W 3"]:
        noise = sampling_noise(pipeline.noising, sample.start_noise, step)
        start = start_noise(noise, shape, keys)
        if sample.brightness:
            vae_params = frozen[pipeline.family.autoencoder]
            start = set_brightness(pipeline.autoencoder, vae_params, noise, start, shifts)
        ids = jax.tree.map(split, input_ids)
        pixels = split(pixels_of(params, frozen, ids, negative_ids, split(start), keys, step))
        return jnp.transpose(jnp.round(pixels * 255.0).astype(jnp.uint8), (0, 2, 3, 1))

    # What a device can decode at once shrinks fast as pictures grow: 16 of 512 px, one of 1024 px.
    each = max(1, min(_BATCH, round(_BATCH * (_LATENTS / (shape[1] * shape[2])) ** 2)))
    jitted = jax.jit(draw, out_shardings=NamedSharding(mesh, P()) if mesh else None)
    return Sampler(
        draw=jitted,
        batch_size=each * num_devices,
        num_devices=num_devices,
        tokenize=pipeline.tokenize,
        negative_ids=pipeline.tokens(sample.negative_prompt).input_ids,
        brightness=tuple(sample.brightness),
        seed=seed,
    )


def sampling_noise(noising: Noising, start_noise: str, step: Any = None) -> Noise:
    """The noise that sampling starts from and injects: that of training, or by `sample.start_noise` plain noise.

    "plain" is how other programs sample: they know nothing of the noise of training, neither at the start nor later.

    Args:
        step: after which training's noise is meant, as of `Noising.noise`.
    """
    return PLAIN if start_noise == "plain" else noising.noise(step)


def start_noise(noise: Noise, shape: tuple[int, int, int], keys: Key[Array, " b"]) -> Float[Array, "b c h w"]:
    """The `x_T` of a shape `(c, h, w)` that sampling starts from, one for each key."""
    return jax.vmap(lambda key: noise.start(key, shape))(keys)


def set_brightness(
    autoencoder: Any, vae_params: PyTree, noise: Noise, start: Float[Array, "b c h w"], shifts: Float[Array, " b"]
) -> Float[Array, "b c h w"]:
    """The same start with its mean moved to a given place between dark and bright.

    A start's channel means are independent normal values. Their component along the direction in which the
    autoencoder's latents go from a black picture to a white one becomes `shifts`, in standard deviations; the others,
    and all that is not the mean, stay. A deterministic sampler takes a brighter start to a brighter picture.

    Args:
        noise: that the start was drawn from.

    Raises:
        UserError: its means are all the same.
    """
    _, channels, height, width = start.shape
    if not noise.weighted(1.0).power(height, width)[:, 0, 0].all():
        raise UserError("sample: --brightness cannot apply: the noise has no power at f = 0, so every mean is the same")
    power = noise.power(height, width)[:, 0, 0]
    deviation = jnp.sqrt(jnp.broadcast_to(jnp.asarray(power, jnp.float32), channels) / (height * width))
    pixels = (3, height * autoencoder.downscale, width * autoencoder.downscale)
    black_and_white = jnp.stack([jnp.full(pixels, x) for x in (-1.0, 1.0)])
    black, white = autoencoder.encode(vae_params, black_and_white)[0].mean((2, 3))
    direction = (white - black) / deviation
    direction /= jnp.linalg.norm(direction)
    place = (start.mean((2, 3)) / deviation) @ direction
    return start + ((shifts - place)[:, None] * direction * deviation)[..., None, None]


def pixel_sampler(pipeline: Pipeline, sample: ConfigDict, resolution: int) -> PixelSampler:
    """The pure `(trained, frozen, input_ids, negative_ids, start, keys, step) → pixels`, as `Sampler.draw`.

    The start is `[b, c, h, w]`, and pixels are in [0, 1].

    The keys are those of the noise that ancestral samplers inject; the others have no use for them.
    """
    wide, high = drawn_size(sample, resolution)
    noising, shape = pipeline.noising, pipeline.latent_shape(wide, high)
    process, noise = noising.process, sampling_noise(noising, sample.start_noise)
    is_ancestral = sample.sampler in ANCESTRAL
    grid = process.grid(
        sample.sampler, sample.num_steps, sample.spacing, grid_shift(pipeline, sample.shift, shape[1] * shape[2])
    )
    table = coefficients(sample.sampler, grid)
    means = mean_table(sample.sampler, grid, process, noise, *shape[1:])

    empty_ids = pipeline.tokens("").input_ids
    # Micro-conditioning as of a picture that was trained on whole: its own size, nothing cropped.
    time_ids = jnp.asarray((high, wide, 0, 0, high, wide), jnp.float32)

    def draw(
        trained: PyTree,
        frozen: PyTree,
        input_ids: Ids,
        negative_ids: Ids,
        start: Float[Array, "b c h w"],
        keys: Key[Array, " b"] | None = None,
        step: Int[Array, ""] | None = None,
    ) -> Float[Array, "b 3 H W"]:
        params, count = join(trained, frozen), len(start)
        injected = sampling_noise(noising, sample.start_noise, step)
        is_guided = sample.guidance_scale != 1.0
        ids = input_ids
        if is_guided:
            ids = {part: _interleaved(jnp.broadcast_to(negative_ids[part], x.shape), x) for part, x in ids.items()}
        sizes = jnp.broadcast_to(time_ids, (count * (1 + is_guided), 6))
        conditions = encode_captions(pipeline, params, ids, sizes, empty_ids)

        def denoiser(noisy, timestep):
            inputs = _interleaved(noisy, noisy) if is_guided else noisy
            prediction = pipeline.denoise(params, inputs, jnp.full(len(inputs), timestep), conditions)
            if not is_guided:
                return prediction
            pairs = prediction.reshape(count, 2, *shape)
            return guided(pairs[:, 0], pairs[:, 1], sample.guidance_scale, sample.guidance_rescale)

        def inject(index):
            def draw_one(key):
                return injected.inject(jax.random.fold_in(jax.random.fold_in(key, 5), index), shape)

            return jax.vmap(draw_one)(keys)

        latents = solve(denoiser, process, table, start, inject if is_ancestral else None, means)
        vae = pipeline.autoencoder
        pixels = vae.decode(params[pipeline.family.autoencoder], latents / vae.scaling_factor)
        return jnp.clip(pixels / 2.0 + 0.5, 0.0, 1.0)

    return draw


def _interleaved(first: Array, second: Array | np.ndarray) -> Array:
    """Both batches as one, in pairs: where a batch is split, each pair stays on its device."""
    return jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])


def draw_pictures(
    sampler: Sampler, params: PyTree, frozen: PyTree, prompts: Sequence[str], seeds: Sequence[int], step: int
) -> list[Picture]:
    """A picture for each prompt, seed and value of `sample.brightness`.

    One seed starts from the same noise for every prompt; with `sample.brightness`, but for its mean.

    Args:
        step: of the parameters.
    """
    shifts = sampler.brightness or (None,)
    requests = [(prompt, seed, shift) for prompt in prompts for seed in seeds for shift in shifts]
    key = stream_key(sampler.seed, "sample")
    pictures: list[Picture] = []
    # The last chunk is filled up so that one compiled program serves all, and that all devices have a share.
    size = min(sampler.batch_size, -(-len(requests) // sampler.num_devices) * sampler.num_devices)
    for begin in range(0, len(requests), size):
        chunk = requests[begin : begin + size]
        padded = chunk + [chunk[-1]] * (size - len(chunk))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray([seed for _, seed, _ in padded], jnp.uint32))
        input_ids = sampler.tokenize([prompt for prompt, *_ in padded])
        moved = np.array([shift or 0.0 for *_, shift in padded], np.float32)
        given = (params, frozen, input_ids, sampler.negative_ids, keys, moved, np.int32(step))
        images = jax.device_get(sampler.draw(*given))
        pictures += [Picture(*request[:2], image, request[2]) for request, image in zip(chunk, images, strict=False)]
    return pictures


def about_samples(sample: ConfigDict, resolution: int, step: int, params: str) -> dict[str, Any]:
    """How pictures were drawn, for the record beside them."""
    keys = ("start_noise", "sampler", "guidance_scale", "guidance_rescale", "num_steps", "spacing")
    about = {"step": step, "params": params, "size": str(drawn_size(sample, resolution))}
    shift = {"shift": sample.shift} if sample.shift else {}  # by default the process's own
    return {**about, **{key: sample[key] for key in keys}, **shift}


def draw_model(
    model: Trained, prompts: Sequence[str], seeds: Sequence[int], **settings: Any
) -> tuple[list[Picture], dict[str, Any]]:
    """Pictures of a model, and how they were drawn.

    Args:
        settings: replace fields of the config's `sample`, such as `start_noise="plain"`.

    Raises:
        UserError: the model draws nothing from prompts, or a setting is out of range.
    """
    config = model.config.copy_and_resolve_references()
    if not task_of(config).denoises:
        raise UserError(f"sample: this is the training of {task_of(config).title}, which draws nothing from prompts")
    config.sample.update(settings)
    validate(config)
    check_resolution(config)
    check_drawn_size(config.sample, resolution_unit(config))
    if bad := [seed for seed in seeds if not 0 <= seed < 2**32]:
        raise UserError(f"sample: --seed={bad[0]} must be between 0 and 2**32 - 1")
    pipeline, resolution = model.pipeline, config.data.resolution
    noise = sampling_noise(pipeline.noising, config.sample.start_noise, model.step)
    _, *size = pipeline.latent_shape(*drawn_size(config.sample, resolution))
    started = describe(noise, config.noise, *size)
    _log.info("starts from %s noise: %s", config.sample.start_noise, started)
    for line in start_warning(pipeline, config.sample, resolution, model.step):
        _log.warning("%s", line)
    sampler = make_sampler(pipeline, config.sample, resolution, config.seed, model.mesh)
    pictures = draw_pictures(sampler, model.params, model.frozen, prompts, seeds, model.step)
    for picture in pictures:
        _log.info("%s  seed %d  brightness %.3f", picture.prompt or "(no prompt)", picture.seed, picture.brightness)
    return pictures, about_samples(config.sample, resolution, model.step, model.which)


def sample(
    model: Trained,
    out: epath.PathLike,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    name: str = "samples",
    **settings: Any,
) -> list[Picture]:
    """Draws into `out`: `NAME.png`, `NAME.json` and each picture's own PNG; otherwise as `draw_model`."""
    out = check_folder("sample", out)
    pictures, about = draw_model(model, prompts, seeds, **settings)
    write_samples(out, name, pictures, about, has_each=True)
    return pictures


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
    """Draws from a work directory's checkpoint, as `sample`.

    Raises:
        UserError: the checkpoint cannot be read, or a setting is out of range.
    """
    return sample(load_trained(workdir, step, params), out, prompts, seeds, name=name, **settings)


def compare(
    load_before: Callable[[], Trained],
    load_after: Callable[[], Trained],
    out: epath.PathLike,
    prompts: Sequence[str],
    seeds: Sequence[int],
    **settings: Any,
) -> None:
    """Draws with two models, side by side, into `out`: `compare.png`, with the brightness under each picture, and
    `compare.json`.

    Both draw from the same seeds, at the size and by the settings of the second, each from the noise of its own
    training. One is in memory at a time.
    """
    out = check_folder("sample", out)
    after_model = load_after()
    config = after_model.config
    after, about_after = draw_model(after_model, prompts, seeds, **settings)
    del after_model
    before_model = load_before()
    before_model.config.seed, before_model.config.data.resolution = config.seed, config.data.resolution
    before_model.config.sample.update({**config.sample.to_dict(), "params": before_model.config.sample.params})
    before, about_before = draw_model(before_model, prompts, seeds, **settings)
    write_comparison(out, before, after, {"before": about_before, "after": about_after})
