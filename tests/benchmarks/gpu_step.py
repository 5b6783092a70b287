"""A training from cached latents on one GPU, beside PyTorch diffusers' UNet under `torch.compile`: steps in turns.

    JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_PREALLOCATE=false \
        .venv/bin/python -m tests.benchmarks.gpu_step --family=sd2 --resolution=512 --batch=32

prints a line of JSON. Ours is the whole step, with text encoders and AdamW; PyTorch's has the UNet alone, in channels
last and under bfloat16 autocast, with fused AdamW; with `--checkpointing` both compute blocks again. Weights and inputs
are random. `--narrow` is a trial of it all, which a CPU can do.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import diffusers
import jax
import numpy as np
import torch
from jaxtyping import PyTree
from ml_collections import ConfigDict

from offsetjax.config import default_config
from offsetjax.models.pipeline import build
from offsetjax.parallel.chips import chip_of
from offsetjax.plan.program import Program, architecture, make_program
from offsetjax.training.abstract import model_flops
from tests.families import narrow_config

ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--family", choices=("sd1", "sd2", "sdxl"), required=True)
    parser.add_argument("--resolution", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--steps", type=int, default=10, help="a round")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--narrow", action="store_true")
    asked = parser.parse_args()
    config = narrow_config(asked.family) if asked.narrow else default_config()
    config.model.family, config.model.pretrained = asked.family, "" if asked.narrow else "none that is there"
    config.model.remat = "blocks" if asked.checkpointing else "none"
    config.data.resolution, config.data.cached_latents = asked.resolution, True
    config.train.global_batch_size, config.optimizer.ema_decay = asked.batch, 0.0
    device = jax.devices()[0]
    program = make_program(architecture(config), [device])
    steps = (our_step(program), torch_step(program.config, "cpu" if device.platform == "cpu" else "cuda"))
    for step in steps:
        seconds(step, 2)  # compiles
    rounds = [[seconds(step, asked.steps) for step in steps] for _ in range(ROUNDS)]
    ours, torchs = (statistics.median(column) for column in zip(*rounds, strict=True))
    chip, flops = chip_of(device.device_kind), model_flops(program.config, program.pipeline)
    found = {
        "device": device.device_kind,
        "seconds": ours,
        "torch_seconds": torchs,
        "images_per_second": asked.batch / ours,
        "ratio": statistics.median(theirs / own for own, theirs in rounds),
        "mfu": flops / (ours * chip.peak_flops) if chip else None,
        "versions": {"jax": jax.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    print(json.dumps(found))


def seconds(step: Callable[[], object], count: int) -> float:
    """Of a step, over so many, the last of which is waited for."""
    begin = time.perf_counter()
    for _ in range(count - 1):
        step()
    result: Any = step()
    float(result)
    return (time.perf_counter() - begin) / count


def our_step(program: Program) -> Callable[[], jax.Array]:
    rng = np.random.default_rng(0)

    def some(leaf: Any) -> np.ndarray:
        if not np.issubdtype(leaf.dtype, np.floating) and leaf.dtype != jax.numpy.bfloat16:
            return np.zeros(leaf.shape, leaf.dtype)
        return (0.02 * rng.standard_normal(leaf.shape, np.float32)).astype(leaf.dtype)

    def nothing(leaf: Any) -> np.ndarray:
        return np.zeros(leaf.shape, leaf.dtype)

    state, frozen, batch = program.arguments
    state = jax.tree.map(nothing, state).replace(params=jax.tree.map(some, state.params))
    held: list[PyTree] = [jax.device_put(state, program.shardings[0])]
    frozen, batch = jax.device_put(jax.tree.map(some, (frozen, batch)), program.shardings[1:])

    def step() -> jax.Array:
        held[0], metrics = program.step(held[0], frozen, batch)
        return metrics["loss"]

    return step


def torch_step(config: ConfigDict, device: str) -> Callable[[], torch.Tensor]:
    unet = diffusers.UNet2DConditionModel.from_config(build(config).denoiser.torch_config())
    unet = unet.to(device, memory_format=torch.channels_last).train()
    if config.model.remat == "blocks":
        unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, fused=device == "cuda")
    compiled: Any = torch.compile(unet) if device == "cuda" else unet
    count, side = config.train.global_batch_size, config.data.resolution // 8
    latents, noise = torch.randn(2, count, config.model.unet.in_channels, side, side, device=device)
    hidden = torch.randn(count, 77, config.model.unet.cross_attention_dim, device=device)
    timesteps = torch.arange(count, device=device) * 10
    conditions = None
    if unet.config.addition_embed_type == "text_time":
        ids = 6 * unet.config.addition_time_embed_dim
        pooled = unet.config.projection_class_embeddings_input_dim - ids
        conditions = {
            "text_embeds": torch.randn(count, pooled, device=device),
            "time_ids": torch.zeros(count, 6, device=device),
        }

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=torch.bfloat16):
            prediction = compiled(latents, timesteps, hidden, added_cond_kwargs=conditions).sample
        loss = torch.nn.functional.mse_loss(prediction.float(), noise)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


if __name__ == "__main__":
    main()
