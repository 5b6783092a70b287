"""What a finished, or interrupted, training left: read back for sampling and export."""

from dataclasses import dataclass

import jax
from etils import epath
from jaxtyping import PyTree
from ml_collections import ConfigDict

from offsetjax import checkpoint, sharding
from offsetjax.config import from_json, to_json
from offsetjax.errors import UserError
from offsetjax.models.pipeline import TRAINED, Pipeline, load_frozen
from offsetjax.step import init_state


@dataclass(frozen=True)
class Trained:
    """One checkpoint of a work directory; `params` are those of the trained part, raw or averaged."""

    config: ConfigDict
    pipeline: Pipeline
    params: PyTree
    frozen: PyTree
    step: int
    which: str


def read_config(workdir: epath.PathLike) -> ConfigDict:
    """The resolved config of a work directory.

    Raises:
        UserError: it is none, or its config.json is damaged.
    """
    file = epath.Path(workdir) / "config.json"
    if not file.exists():
        raise UserError(f"workdir: {workdir} has no config.json; give the --workdir of a training")
    try:
        return from_json(file.read_text())
    except ValueError as error:
        raise UserError(f"workdir: {file} is not JSON ({error}); restore it from a copy") from error


def write_config(workdir: epath.PathLike, config: ConfigDict) -> None:
    """Writes config.json under a temporary name and renames it: a work directory is never left with half of one."""
    temporary = epath.Path(workdir) / ".config.json.unfinished"
    temporary.write_text(to_json(config))
    temporary.replace(epath.Path(workdir) / "config.json")


def load_trained(workdir: epath.PathLike, step: int | None = None, which: str | None = None) -> Trained:
    """Reads one checkpoint, sharded over all devices.

    Args:
        step: None is the newest.
        which: "ema" or "raw"; None is the config's `sample.params`, or raw where no average was kept.

    Raises:
        UserError: no work directory, no such step, or an average that was not kept.
    """
    config = read_config(workdir)
    if which == "ema" and not config.optimizer.ema_decay:
        raise UserError("params: no average was kept (optimizer.ema_decay = 0); use --params=raw")
    which = which or (config.sample.params if config.optimizer.ema_decay else "raw")
    pipeline, frozen = load_frozen(epath.Path(workdir) / "frozen", config)
    model = getattr(pipeline, TRAINED[config.task])
    like = jax.eval_shape(lambda key: init_state(model.init(key), config), jax.random.key(0))
    mesh = sharding.mesh_of(data=1, fsdp=jax.device_count())
    with checkpoint.open_checkpoints(workdir) as manager:
        state, _ = checkpoint.restore(manager, checkpoint.abstract(like, sharding.shardings(mesh, like)), step)
    params = state.ema_params if which == "ema" else state.params
    return Trained(config, pipeline, params, frozen, int(state.step), which)
