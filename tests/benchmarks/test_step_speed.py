"""How fast a step is beside PyTorch, and in the loop: `launch/local.sh test tests/benchmarks -m slow -s` prints it."""

import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator

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

from offsetjax import sharding
from offsetjax.checkpoint import open_checkpoints
from offsetjax.data.devices import on_devices
from offsetjax.data.stream import open_source
from offsetjax.models.pipeline import build
from offsetjax.run import first_state, open_run, open_stream
from offsetjax.train import jit_train_step, train
from tests.families import narrow_config
from tests.tiny import build_data, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROUNDS, STEPS = 5, 3
LEARNING_RATE = 1e-4


def _seconds(step: Callable[[], object], count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - begin) / count


def _our_step(config: ConfigDict, latents: np.ndarray, hidden: np.ndarray, noise: np.ndarray) -> Callable[[], object]:
    unet, optimizer = build(config).unet, optax.adamw(LEARNING_RATE)
    timesteps = jnp.arange(len(latents)) * 100

    @jax.jit
    def step(params, opt_state):
        loss = lambda params: jnp.square(unet.apply(params, latents, timesteps, hidden) - noise).mean()  # noqa: E731
        value, gradients = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    params = jax.jit(unet.init)(jax.random.key(0))
    state = [params, optimizer.init(params)]

    def run() -> object:
        *state[:], loss = step(*state)
        return loss.item()

    return run


def _torch_step(config: ConfigDict, latents: np.ndarray, hidden: np.ndarray, noise: np.ndarray) -> Callable[[], object]:
    unet = diffusers.UNet2DConditionModel.from_config(build(config).unet.torch_config())
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE)
    inputs = [torch.from_numpy(each) for each in (latents, hidden, noise)]
    timesteps = torch.arange(len(latents)) * 100

    def run() -> object:
        optimizer.zero_grad()
        prediction = unet(inputs[0], timesteps, inputs[1]).sample
        loss = torch.nn.functional.mse_loss(prediction, inputs[2])
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def test_a_step_beside_pytorch(capsys: pytest.CaptureFixture[str]) -> None:
    """A narrow Stable Diffusion 1.x on this machine's CPU, float32, batch 4, AdamW: for information."""
    config = narrow_config("sd1")
    config.model.dtype = "float32"
    config.model.unet.block_out_channels = (64, 128, 256, 256)
    rng = np.random.default_rng(0)
    latents, noise = rng.normal(size=(2, 4, 4, 32, 32)).astype(np.float32)
    hidden = rng.normal(size=(4, 77, config.model.unet.cross_attention_dim)).astype(np.float32)
    steps = [make(config, latents, hidden, noise) for make in (_our_step, _torch_step)]
    for step in steps:
        step()
    rounds = [[_seconds(step, STEPS) for step in steps] for _ in range(ROUNDS)]
    ours, torchs = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(torch_seconds / seconds for seconds, torch_seconds in rounds)
    with capsys.disabled():
        print(f"\na step: {ours:.3f} s, PyTorch {torchs:.3f} s; {ratio:.2f} times PyTorch's speed")
    assert 0.05 < ratio < 20


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return build_data(tmp_path_factory.mktemp("speed"), count=32)


def _logged(workdir: pathlib.Path, after: int) -> Iterator[dict[str, float]]:
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        if values["step"] > after and "step_seconds" in values:
            yield values


def test_the_loop_beside_the_bare_step(
    data: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps a second of the whole loop, reading data and logging, as a share of those of the step alone."""
    workdir, count = tmp_path / "run", 20
    config = tiny_config(data, train__log_every_steps=5, checkpoint__every_steps=10_000)
    config.model.unet.update(block_out_channels=(128,), norm_num_groups=32, layers_per_block=2)
    config.mesh.update(data=1, fsdp=-1)
    shares, waits = [], []
    for number in range(1, 4):
        config.train.steps = number * count
        train(config, workdir)
        logged = list(_logged(workdir, (number - 1) * count + 5))  # the first lines have the compilation
        looped = statistics.median(values["step_seconds"] for values in logged)
        waits.append(statistics.median(values["data_wait_seconds"] / values["step_seconds"] for values in logged))
        shares.append(_bare_seconds(config, workdir, count) / looped)
    share, wait = statistics.median(shares), statistics.median(waits)
    with capsys.disabled():
        print(f"\nthe loop: {100 * share:.1f} % of the bare step's speed; {100 * wait:.2f} % of it waiting for data")
    assert share > 0.9
    assert wait < 0.02


def _bare_seconds(config: ConfigDict, workdir: pathlib.Path, count: int) -> float:
    source = open_source(config.data.path, config.data.split)
    run = open_run(config, epath.Path(workdir), source)
    stream = open_stream(run.config, run.pipeline, source)
    host_batches = stream.iterator(0)
    batch = next(on_devices(host_batches, NamedSharding(run.mesh, sharding.BATCH)))
    host_batches.close()
    with open_checkpoints(workdir, 1) as manager:
        state, shardings = first_state(run, manager, stream)
    step = jit_train_step(run, shardings)
    state, metrics = step(state, run.frozen, batch)
    jax.block_until_ready(metrics)
    begin = time.perf_counter()
    for _ in range(count):
        state, metrics = step(state, run.frozen, batch)
    jax.block_until_ready((state, metrics))
    return (time.perf_counter() - begin) / count
