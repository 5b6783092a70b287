"""The train step of a run, placed on its mesh: one program for each size of its pictures."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from offsetjax.models.pipeline import for_training
from offsetjax.models.task import task_of
from offsetjax.parallel import fsdp, sharding
from offsetjax.parallel.finite import all_finite
from offsetjax.training.objective import Objective
from offsetjax.training.setup import Run
from offsetjax.training.step import TrainStep, make_gradient, make_train_step, make_update


def jit_train_step(run: Run, state_shardings: PyTree) -> TrainStep:
    """The train step of a run, or of a stage of one, with its placement."""
    config, platform = run.config, run.mesh.devices.flat[0].platform
    pipeline = for_training(run.pipeline, config.data.resolution, platform, run.mesh.shape["fsdp"])
    return place(task_of(config).objective(pipeline, config), pipeline.dtypes, run, state_shardings)


def place(objective: Objective, dtypes: Mapping[str, Any], run: Run, state_shardings: PyTree) -> TrainStep:
    """The train step of an objective on the run's mesh: the state is donated, batches are split over all devices."""
    config = run.config
    gradient = make_gradient(objective, config.train.accumulate_steps)
    gradient = fsdp.on_mesh(gradient, run.mesh, run.pipeline.sharding, dtypes)
    update = make_update(config.optimizer, config.train, config.model, run.steps)
    is_finite = partial(all_finite, mesh=run.mesh, rules=run.pipeline.sharding)
    return jax.jit(
        make_train_step(gradient, update, is_finite, saves_memory=run.mesh.devices.flat[0].platform != "cpu"),
        in_shardings=(
            state_shardings,
            sharding.shardings(run.mesh, run.pipeline.sharding, run.step_frozen),
            NamedSharding(run.mesh, sharding.BATCH),
        ),
        out_shardings=(state_shardings, NamedSharding(run.mesh, P())),
        donate_argnums=0,
    )
