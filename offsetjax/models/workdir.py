"""What a finished, or interrupted, training left: read back for sampling and export."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from offsetjax.config import from_json, to_json
from offsetjax.errors import UserError
from offsetjax.files import write_whole
from offsetjax.formats.names import torch_tensors
from offsetjax.formats.tensors import Tensor
from offsetjax.json_text import parse_object
from offsetjax.models.family import family_of
from offsetjax.models.initial import abstract_trained
from offsetjax.models.lora import merged_tensors
from offsetjax.models.pipeline import Pipeline, adapter_scale, build, frozen_parts
from offsetjax.models.task import task_of
from offsetjax.models.weights import frozen_tensors, load_frozen, read_tokenizers
from offsetjax.parallel import sharding
from offsetjax.parallel.finite import all_finite
from offsetjax.storage import checkpoint, digests
from offsetjax.storage.retry import retried


@dataclass(frozen=True)
class Trained:
    """A model that can be sampled; `params` are those of the trained parts, raw or averaged, by part."""

    config: ConfigDict
    pipeline: Pipeline
    params: Mapping[str, PyTree]
    frozen: Mapping[str, PyTree]
    step: int
    which: str
    mesh: Mesh


@dataclass(frozen=True)
class Stored:
    """The same, for export: `params` are tensors that are not read yet."""

    config: ConfigDict
    pipeline: Pipeline
    params: Mapping[str, PyTree]
    frozen: epath.Path
    step: int
    which: str

    def part(self, part: str) -> dict[str, Tensor]:
        """A part as it draws, by PyTorch's names: adapters are merged into their base."""
        if part in self.params and not self.config.lora.rank:
            return torch_tensors(self.params[part])
        tensors = frozen_tensors(self.frozen, part, self.pipeline.parts[part])
        if part not in self.params:
            return tensors
        return merged_tensors(tensors, self.adapters(part), adapter_scale(self.config))

    def adapters(self, part: str) -> PyTree:
        """The adapters of a part, on the host."""
        return jax.tree.map(lambda tensor: tensor(), self.params[part])


def read_config(workdir: epath.PathLike) -> ConfigDict:
    """The resolved config of a work directory.

    Raises:
        UserError: it is none, or its config.json is damaged.
    """
    file = epath.Path(workdir) / "config.json"
    if not file.exists():
        raise UserError(f"workdir: {workdir} has no config.json; give the --workdir of a training")
    try:
        text = retried(file.read_text, f"workdir: {file}")
        digests.check_json(parse_object(text), f"workdir: {file}")
        return from_json(text)
    except ValueError as error:
        raise UserError(f"workdir: {file} is no config ({error}); restore it from a copy") from error


def write_config(workdir: epath.PathLike, config: ConfigDict) -> None:
    """Writes config.json, with its own digest."""
    stored = digests.signed(parse_object(to_json(config)))
    write_whole(epath.Path(workdir) / "config.json", json.dumps(stored, indent=2) + "\n")


def load_trained(workdir: epath.PathLike, step: int | None = None, which: str | None = None) -> Trained:
    """Reads one checkpoint, sharded over all devices; of its state, no more than what is asked for.

    Args:
        step: None is the newest.
        which: "ema" or "raw"; None is the config's `sample.params`, or raw where no average was kept.

    Raises:
        UserError: no work directory, no such step, an average that was not kept, or weights that are not finite.
    """
    config, pipeline, which = _open(workdir, which)
    mesh = sharding.mesh_of(data=1, fsdp=jax.device_count())
    place = partial(sharding.shardings, mesh, pipeline.sharding)
    like = abstract_trained(config, pipeline)
    with checkpoint.open_checkpoints(workdir) as manager:
        step = checkpoint.existing_step(manager, step)
        params = checkpoint.restore_part(manager, _FIELD[which], checkpoint.abstract(like, place(like)), step)
    if not jax.jit(partial(all_finite, mesh=mesh, rules=pipeline.sharding))(params):
        raise UserError(
            f"workdir: {workdir}, step {step}: {_not_finite(params)} of the {which} weights has values that are not "
            "finite; give other --params or an earlier --step"
        )
    frozen = load_frozen(epath.Path(workdir) / "frozen", pipeline, frozen_parts(config), place)
    return Trained(config, pipeline, params, frozen, step, which, mesh)


def _not_finite(params: PyTree) -> str:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = [path for path, leaf in leaves if not jnp.isfinite(leaf).all()]
    return jax.tree_util.keystr(paths[0], simple=True, separator="/")


def open_stored(workdir: epath.PathLike, step: int | None = None, which: str | None = None) -> Stored:
    """The same, without reading the weights.

    Raises:
        UserError: as for `load_trained`; what is damaged is found when it is read.
    """
    config, pipeline, which = _open(workdir, which)
    with checkpoint.open_checkpoints(workdir) as manager:
        step = checkpoint.existing_step(manager, step)
        params = checkpoint.open_part(manager, _FIELD[which], abstract_trained(config, pipeline), step)
    return Stored(config, pipeline, params, epath.Path(workdir) / "frozen", step, which)


_FIELD = {"raw": "params", "ema": "ema_params"}


def _open(workdir: epath.PathLike, which: str | None) -> tuple[ConfigDict, Pipeline, str]:
    config, folder = read_config(workdir), epath.Path(workdir)
    if which == "ema" and not config.optimizer.ema_decay:
        raise UserError("params: no average was kept (optimizer.ema_decay = 0); use --params=raw")
    if not (folder / "checkpoints").exists():
        raise UserError(f"workdir: {workdir} has no checkpoint yet; wait for the first of its training")
    which = which or (config.sample.params if config.optimizer.ema_decay else "raw")
    pipeline = build(config, read_tokenizers(folder / "frozen", family_of(config)))
    if task_of(config).denoises and len(pipeline.tokenizers) != len(pipeline.family.encoders):
        raise UserError(f"workdir: {folder / 'frozen'} lacks a tokenizer; restore it from a copy")
    digests.check(folder / "frozen")
    return config, pipeline, which
