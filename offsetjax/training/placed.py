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
from offsetjax.training.mixed import MixedStep, Sums, make_finish, make_part, no_sums
from offsetjax.training.objective import Objective
from offsetjax.training.setup import Run
from offsetjax.training.step import Counts, TrainStep, make_apply, make_gradient, make_train_step, make_update
from offsetjax.training.streams import parts_of_a_size


def jit_train_step(run: Run, state_shardings: PyTree) -> TrainStep:
    """The train step of a run, or of a stage of one, with its placement."""
    config, platform = run.config, run.mesh.devices.flat[0].platform
    pipeline = for_training(run.pipeline, config.data.resolution, platform, run.mesh.shape["fsdp"])
    return place(task_of(config).objective(pipeline, config), pipeline.dtypes, run, state_shardings)


def place(objective: Objective, dtypes: Mapping[str, Any], run: Run, state_shardings: PyTree) -> TrainStep:
    """The train step of an objective on the run's mesh: the state is donated, batches are split over all devices."""
    config, mesh, rules = run.config, run.mesh, run.pipeline.sharding
    gradient = make_gradient(objective, parts_of_a_size(config))
    gradient = fsdp.on_mesh(gradient, mesh, rules, dtypes)
    update = make_update(config.optimizer, config.train, config.model, run.steps)
    is_finite = partial(all_finite, mesh=mesh, rules=rules)
    saves_memory = mesh.devices.flat[0].platform != "cpu"
    frozen, batch = sharding.shardings(mesh, rules, run.step_frozen), NamedSharding(mesh, sharding.BATCH)
    replicated = NamedSharding(mesh, P())
    if not config.data.mixed_sizes:
        return jax.jit(
            make_train_step(gradient, update, is_finite, saves_memory),
            in_shardings=(state_shardings, frozen, batch),
            out_shardings=(state_shardings, replicated),
            donate_argnums=0,
        )
    params = state_shardings.params
    sums = Sums(replicated, replicated, params, Counts(replicated, replicated))
    reads_captions = bool(run.pipeline.tokens("").input_ids)
    return MixedStep(
        begin=jax.jit(no_sums, in_shardings=(params,), out_shardings=sums),
        part=jax.jit(
            make_part(gradient),
            in_shardings=(sums, params, frozen, batch, replicated),
            out_shardings=(sums, replicated),
            donate_argnums=0,
        ),
        finish=jax.jit(
            make_finish(make_apply(update, is_finite, saves_memory), reads_captions),
            in_shardings=(state_shardings, sums),
            out_shardings=(state_shardings, replicated),
            donate_argnums=0,
        ),
    )
