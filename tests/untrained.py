"""A run before its first step: what it trains, and a checkpoint of that."""

import pathlib

from etils import epath
from jaxtyping import PyTree
from ml_collections import ConfigDict

from offsetjax.models.weights import abstract_trained, initial_trained
from offsetjax.parallel import sharding
from offsetjax.storage import checkpoint
from offsetjax.training.setup import Run, open_run
from offsetjax.training.step import init_state
from tests.tiny import update_of


def begin(config: ConfigDict, workdir: pathlib.Path) -> tuple[Run, PyTree]:
    """A run, and what it trains before the first step."""
    run = open_run(config, epath.Path(workdir), source=None)
    place = sharding.shardings(run.mesh, run.pipeline.sharding, abstract_trained(run.pipeline, run.config.lora))
    return run, initial_trained(run.pipeline, run.config.model, run.config.lora, run.config.seed, place)


def save_untrained(config: ConfigDict, workdir: pathlib.Path) -> None:
    """A training of no steps, with a checkpoint."""
    run, trained = begin(config, workdir)
    with checkpoint.open_checkpoints(workdir) as manager:
        checkpoint.save(manager, 0, init_state(trained, update_of(run.config)), {"next_batch": 0})
