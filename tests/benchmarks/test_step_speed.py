"""How fast a step is beside PyTorch's, and in the loop; `launch/local.sh test tests/benchmarks -m slow -s -k step`.

Both sides of a ratio run in turns in one process, for timings on one machine drift together; each on one device with
all of the machine's cores, and compiled with all care, unlike the other tests.
"""

import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from etils import epath
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from offsetjax.data.devices import on_devices
from offsetjax.data.source import open_source
from offsetjax.models.pipeline import build
from offsetjax.parallel import sharding
from offsetjax.storage.checkpoint import open_checkpoints
from offsetjax.train import jit_train_step, train
from offsetjax.training.setup import open_run
from offsetjax.training.states import first_state
from offsetjax.training.streams import open_stream
from tests.families import narrow_config
from tests.processes import call
from tests.tiny import build_data, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
ROUNDS = 5


def _seconds(step: Callable[[], object], count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - begin) / count


def test_a_step_beside_pytorchs(capsys: pytest.CaptureFixture[str]) -> None:
    """A narrow denoiser of Stable Diffusion 1.x, float32, batch 4 of 16x16 latents, AdamW."""
    rounds = call(_beside_pytorch, seconds=3000)
    ours, torchs = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(torch_seconds / seconds for seconds, torch_seconds in rounds)
    with capsys.disabled():
        print(f"\na step: {ours:.3f} s, PyTorch's {torchs:.3f} s; {ratio:.2f} times PyTorch's speed")
    assert ratio > 0.5  # it was 0.82


def _beside_pytorch() -> list[list[float]]:
    """Seconds of our step and of PyTorch's, each round."""
    jax.config.update("jax_disable_most_optimizations", False)
    torch.set_num_threads(os.cpu_count() or 1)
    config = narrow_config("sd1")
    config.model.dtype = "float32"
    config.model.unet.block_out_channels = (64, 128, 256, 256)
    rng = np.random.default_rng(0)
    latents, noise = rng.normal(size=(2, 4, 4, 16, 16)).astype(np.float32)
    hidden = rng.normal(size=(4, 77, config.model.unet.cross_attention_dim)).astype(np.float32)
    steps = [make(config, latents, hidden, noise) for make in (_our_step, _torch_step)]
    for step in steps:
        _seconds(step, 2)
    return [[_seconds(step, 2) for step in steps] for _ in range(ROUNDS)]


def _our_step(config: ConfigDict, latents: np.ndarray, hidden: np.ndarray, noise: np.ndarray) -> Callable[[], float]:
    unet, optimizer = build(config).denoiser, optax.adamw(1e-4)
    timesteps = jnp.arange(len(latents)) * 100

    def loss_of(params):
        return jnp.square(unet.apply(params, latents, timesteps, hidden) - noise).mean()

    @jax.jit
    def step(params, opt_state):
        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    params = jax.jit(unet.init)(jax.random.key(0))
    state = [params, optimizer.init(params)]

    def run() -> float:
        *state[:], loss = step(*state)
        return loss.item()

    return run


def _torch_step(config: ConfigDict, latents: np.ndarray, hidden: np.ndarray, noise: np.ndarray) -> Callable[[], float]:
    unet = diffusers.UNet2DConditionModel.from_config(build(config).denoiser.torch_config())
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    inputs, context, target = map(torch.from_numpy, (latents, hidden, noise))
    timesteps = torch.arange(len(latents)) * 100

    def run() -> float:
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(unet(inputs, timesteps, context).sample, target)
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def test_the_loop_beside_the_bare_step(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps a second of the whole loop, reading data and logging, as a share of those of the step alone."""
    rounds = call(_beside_the_bare_step, build_data(tmp_path, count=32), tmp_path, seconds=3000)
    looped, bare, _ = (statistics.median(column) for column in zip(*rounds, strict=True))
    share = statistics.median(bare / looped for looped, bare, _ in rounds)
    wait = statistics.median(waited / looped for looped, _, waited in rounds)
    with capsys.disabled():
        print(f"\na step in the loop: {looped:.3f} s, alone {bare:.3f} s; {share:.1%} of its speed")
        print(f"waiting for data: {wait:.2%}")
    assert share >= 0.97
    assert wait < 0.02


LOG_EVERY, LAPS = 5, 3


def _beside_the_bare_step(data: pathlib.Path, folder: pathlib.Path) -> list[tuple[float, float, float]]:
    """Seconds a step of the loop and of the step alone, and of waiting for data, each round."""
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    workdir = folder / "run"
    config = tiny_config(
        data, train__log_every_steps=LOG_EVERY, checkpoint__every_steps=10_000, optimizer__decay="constant"
    )
    config.model.unet.update(block_out_channels=(128,), norm_num_groups=32, layers_per_block=2)
    bare: Callable[[], float] | None = None
    rounds = []
    for number in range(ROUNDS):
        first = number * LOG_EVERY * (LAPS + 1)
        config.train.steps = first + LOG_EVERY * (LAPS + 1)
        train(config, workdir)
        bare = bare or _bare(config, workdir)
        laps = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        laps = [lap for lap in laps if lap["step"] > first + LOG_EVERY]  # the first ones have the compilation
        looped, waited = (statistics.median(lap[key] for lap in laps) for key in ("step_seconds", "data_wait_seconds"))
        rounds.append((looped, statistics.median(bare() for _ in range(LAPS)), waited))
    return rounds


def _bare(config: ConfigDict, workdir: pathlib.Path) -> Callable[[], float]:
    """Seconds of a step by itself, again and again on the same batch."""
    source = open_source(config.data.path, config.data.split)
    run = open_run(config, epath.Path(workdir), source)
    stream = open_stream(run.config, run.pipeline, source)
    host_batches = stream.iterator(0)
    where = NamedSharding(run.mesh, sharding.BATCH)
    batch = next(on_devices(host_batches, where, config.train.global_batch_size))
    host_batches.close()
    with open_checkpoints(workdir, 1) as manager:
        state, shardings, _ = first_state(run, manager, stream)
    step = jit_train_step(run, shardings)

    def laps() -> float:
        nonlocal state
        begin = time.perf_counter()
        for _ in range(LOG_EVERY):
            state, metrics = step(state, run.frozen, batch)
        jax.block_until_ready((state, metrics))
        return (time.perf_counter() - begin) / LOG_EVERY

    laps()
    return laps


def test_a_flows_step_beside_the_present_one(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole step from pictures, of a flow with a logit-normal density and of the variance-preserving process."""
    rounds = call(_flow_beside_the_present, build_data(tmp_path, count=32), tmp_path, seconds=3000)
    flow, present = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(one / other for one, other in rounds)
    with capsys.disabled():
        print(f"\na flow's step: {flow:.3f} s, the present one {present:.3f} s; {ratio:.3f} times its time")
    assert ratio < 1.02


def _flow_beside_the_present(data: pathlib.Path, folder: pathlib.Path) -> list[list[float]]:
    """Seconds of a step of each, each round; who comes first changes from round to round."""
    jax.config.update("jax_disable_most_optimizations", False)
    steps = []
    for process in ("flow", "variance_preserving"):
        config = tiny_config(data, train__steps=1, schedule__process=process, optimizer__decay="constant")
        config.model.unet.update(block_out_channels=(128,), norm_num_groups=32, layers_per_block=2)
        if process == "flow":
            config.timesteps.density = "logit_normal"
        train(config, folder / process)
        steps.append(_bare(config, folder / process))
    rounds = []
    for number in range(4 * ROUNDS):
        order = (0, 1) if number % 2 else (1, 0)
        found = {index: steps[index]() for index in order}
        rounds.append([found[0], found[1]])
    return rounds
