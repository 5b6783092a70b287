"""A checkpoint to a model that others load, written under a temporary name and renamed, tensor by tensor.

    diffusers     a directory for `from_pretrained`
    single_file   one file in the original layout, for ComfyUI, A1111, Forge, kohya's scripts and `from_single_file`
    lora          the adapters alone, with kohya's or diffusers' keys
    comfyui_node  no weights: the noise of the training, for ComfyUI to start from

No more than a few tensors are in memory, whatever the model's size. To a bucket each is read twice: the header has
their checksums, and nothing there can be gone back into.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from offsetjax.errors import UserError
from offsetjax.exporting.comfyui import comfyui_node
from offsetjax.exporting.metadata import header
from offsetjax.exporting.model_card import SPECTRUM_FILE, model_card
from offsetjax.files import is_remote
from offsetjax.formats import diffusers as files
from offsetjax.formats.lora import write_lora
from offsetjax.formats.memory import freed_memory_kept
from offsetjax.formats.safetensors import NotFiniteError, write_tensors
from offsetjax.formats.single_file import write_single_file
from offsetjax.formats.tensors import Tensor, inspected, of_array
from offsetjax.leftovers import unfinished_name
from offsetjax.models.family import Family
from offsetjax.models.frozen import carried_of, write_tokenizers
from offsetjax.models.pipeline import Pipeline, grid_shift
from offsetjax.models.task import task_of
from offsetjax.models.trained import Stored, open_stored
from offsetjax.models.weights import abstract_params
from offsetjax.sampling.reach import matched_sampler

_SUFFIXES = {"single_file": ".safetensors", "lora": ".safetensors", "comfyui_node": ".py"}


def export(
    workdir: epath.PathLike,
    out: epath.PathLike,
    *,
    form: str = "diffusers",
    step: int | None = None,
    params: str | None = None,
    dtype: str = "float32",
    lora_keys: str | None = None,
    max_shard_gb: float | None = None,
) -> None:
    """Writes a model that PyTorch programs load; adapters are merged into their base but for `form = "lora"`.

    An autoencoder's training gives a directory with the `vae/` alone, which `model.pretrained` accepts.

    Args:
        form: diffusers (a directory), single_file or lora (a file whose name ends in .safetensors), or comfyui_node
            (one that ends in .py, which has no weights).
        params: "ema" or "raw"; None is the config's `sample.params`.
        lora_keys: kohya, the default, or diffusers.
        max_shard_gb: a directory's weights beyond so many gigabytes, by default 10, are split over several files.

    Raises:
        UserError: `out` exists, the form does not go with the training or the family, the checkpoint cannot be read, or
            it has values that are not finite in `dtype`.
    """
    out = epath.Path(out)
    if out.exists():
        raise UserError(f"export: {out} exists; give another --out, or remove it")
    suffix = _SUFFIXES.get(form, out.suffix)
    if out.suffix != suffix:
        raise UserError(f"export: --format={form} writes one file; give an --out that ends in {suffix}, not {out}")
    if form == "comfyui_node" and dtype != "float32":
        raise UserError("export: --dtype cannot apply to --format=comfyui_node, which has no weights; leave it out")
    if lora_keys and form != "lora":
        raise UserError(f"export: --lora_keys cannot apply to --format={form}; leave it out")
    if max_shard_gb is not None and (form != "diffusers" or not 0 < max_shard_gb < math.inf):
        raise UserError(f"export: --max_shard_gb={max_shard_gb} must be above 0, and needs --format=diffusers")
    stored = open_stored(workdir, step, params)
    task = task_of(stored.config)
    if form not in task.formats:
        raise UserError(f"export: {workdir} trained {task.title}; use --format={' or '.join(task.formats)}")
    if form == "lora" and not stored.config.lora.rank:
        raise UserError(
            f"export: {workdir} trained whole weights (lora.rank = 0); use --format=diffusers or single_file"
        )
    _check_layout(stored.pipeline.family, form, lora_keys or "kohya")
    temporary = unfinished_name(out)
    new_folders = [folder for folder in out.parents if not folder.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with freed_memory_kept():
            if form == "diffusers":
                _write_directory(temporary, stored, dtype, int((max_shard_gb or 10.0) * 1e9), out.name)
            elif form == "comfyui_node":
                temporary.write_text(
                    comfyui_node(stored.pipeline, stored.config.data.resolution, out.stem, stored.step)
                )
            elif form == "single_file":
                _write_single_file(temporary, stored, dtype, out.stem)
            else:
                _write_lora(temporary, stored, dtype, out.stem, lora_keys or "kohya")
        temporary.rename(out)
    except NotFiniteError as error:
        others = "" if dtype == "float32" else ", or --dtype=float32"
        raise UserError(f"export: {error}; give other --params or an earlier --step{others}") from error
    finally:
        if temporary.exists():
            (temporary.rmtree if temporary.is_dir() else temporary.unlink)()
        for folder in new_folders if not out.exists() else ():
            if folder.exists():  # on a bucket there are no empty ones
                folder.rmdir()


def _check_layout(family: Family, form: str, lora_keys: str) -> None:
    """Raises a UserError unless the form has names for the family's tensors."""
    if form == "single_file" and not family.files.original:
        raise UserError(
            f"export: {family.title} has no single-file layout, which --format=single_file asks for; use "
            "--format=diffusers"
        )
    if form == "lora" and lora_keys == "kohya" and not family.files.kohya.prefixes:
        raise UserError(
            f"export: {family.title} has no layer names of kohya's, which --format=lora writes by default; add "
            "--lora_keys=diffusers, or use --format=diffusers, which merges the adapters"
        )


def _write_directory(out: epath.Path, stored: Stored, dtype: str, max_shard_bytes: int, title: str) -> None:
    config, pipeline = stored.config, stored.pipeline
    parts = {part: stored.part(part) for part in stored.pipeline.needed}
    with _progress(out, out.name, parts) as parts:
        for part, tensors in parts.items():
            is_denoiser = part == pipeline.family.denoiser
            metadata = header(pipeline, config, stored.step, "diffusers", title) if is_denoiser else {}
            files.write_part(
                out,
                part,
                _torch_config(stored, part),
                tensors,
                dtype=dtype,
                metadata=metadata,
                max_shard_bytes=max_shard_bytes,
            )
    if task_of(config).denoises:
        write_tokenizers(out, pipeline.family, pipeline.tokenizers)
        sample, resolution = config.sample, config.data.resolution
        sampler = matched_sampler(pipeline, sample.sampler, pipeline.noising.noise(stored.step))
        scheduler = files.scheduler_config(_scheduler(stored, sampler))
        files.write_scheduler(out, scheduler)
        (out / "README.md").write_text(model_card(pipeline, sample, resolution, stored.step))
        write_spectrum(out, pipeline, resolution, stored.step)
        described = pipeline.family.files
        files.write_index(out, described.pipeline, scheduler["_class_name"], described.index(pipeline.settings))


def _write_single_file(out: epath.Path, stored: Stored, dtype: str, title: str) -> None:
    config = stored.config
    parts = {part: stored.part(part) for part in stored.pipeline.needed}
    configs = {part: _torch_config(stored, part) for part in parts}
    configs["scheduler"] = _scheduler(stored, "ddim")
    with _progress(out, title, parts) as parts:
        metadata = header(stored.pipeline, config, stored.step, "single_file", title)
        carried = carried_of(stored.frozen)
        write_single_file(out, parts, configs, stored.pipeline.family.name, carried, dtype=dtype, metadata=metadata)


def _write_lora(out: epath.Path, stored: Stored, dtype: str, title: str, lora_keys: str) -> None:
    config, pipeline = stored.config, stored.pipeline
    write_lora(
        out,
        {part: stored.adapters(part) for part in pipeline.trained},
        base_like={part: abstract_params(pipeline.parts[part]) for part in pipeline.trained},
        keys=lora_keys,
        family=pipeline.family.name,
        kohya=pipeline.family.files.kohya,
        rank=config.lora.rank,
        alpha=config.lora.alpha or config.lora.rank,
        dtype=dtype,
        metadata=header(pipeline, config, stored.step, "lora", title),
    )


def _scheduler(stored: Stored, sampler: str) -> dict[str, Any]:
    config, pipeline = stored.config, stored.pipeline
    _, height, width = pipeline.latent_shape(config.data.resolution)
    shift = grid_shift(pipeline, config.sample.shift, height * width)
    return pipeline.noising.process.scheduler(sampler, config.sample.spacing, shift)


def _torch_config(stored: Stored, part: str) -> dict[str, Any]:
    """The part's `config.json`; the size that a pipeline draws by default is that of training."""
    config, pipeline = stored.config, stored.pipeline
    torch_config = pipeline.parts[part].torch_config()
    if part == pipeline.family.denoiser:
        torch_config["sample_size"] = config.data.resolution // pipeline.autoencoder.downscale
    return torch_config


@contextlib.contextmanager
def _progress(
    out: epath.Path, title: str, parts: Mapping[str, Mapping[str, Tensor]]
) -> Iterator[dict[str, dict[str, Tensor]]]:
    """The same tensors, whose reading moves a bar on the terminal."""
    console = Console(stderr=True)
    times = 2 if is_remote(out) else 1  # that each is read by `write_tensors`
    total = times * sum(tensor.nbytes for tensors in parts.values() for tensor in tensors.values())
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(title, total=total)

        def advance(array: np.ndarray) -> None:
            progress.advance(task, array.nbytes)

        yield {
            part: {name: inspected(tensor, advance) for name, tensor in tensors.items()}
            for part, tensors in parts.items()
        }


def write_spectrum(out: epath.Path, pipeline: Pipeline, resolution: int, step: int) -> None:
    """The deviation of each mode of coloured noise, which the card's recipe reads; an offset comes on top."""
    _, height, width = pipeline.latent_shape(resolution)
    power = pipeline.noising.noise(step).coloured_power(height, width)
    if power is None:
        return
    (out / SPECTRUM_FILE).parent.mkdir()
    write_tensors(out / SPECTRUM_FILE, {"root_spectrum": of_array(np.asarray(np.sqrt(power), np.float32))})
