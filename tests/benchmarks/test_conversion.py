"""A network of ε or v is trained on as a flow, plain or mapped, whole or by a LoRA: what each keeps and learns.

    launch/local.sh test tests/benchmarks/test_conversion.py -m slow -s

In small: a perceptron of 0.2 M parameters over 8x8 latents of two kinds of pictures, each with a brightness and a wave
of its own, with the package's processes, noise, densities and loss. The measure is one for all: the error of the flow's
velocity under plain noise, over t, at draws that are no part of the training.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from offsetjax.diffusion.density import Density
from offsetjax.diffusion.flow import Flow
from offsetjax.diffusion.loss import mean_squared_error, min_snr_weight
from offsetjax.diffusion.mapped_flow import MappedFlow
from offsetjax.diffusion.process import Process, add_noise
from offsetjax.diffusion.variance_preserving import variance_preserving

SIDE, WIDTH, BATCH, RANK, SEEDS = 8, 256, 64, 8, 3
BASE_STEPS, AFTER = 4000, (0, 50, 200, 800)


def _pictures(key: jax.Array, count: int) -> jax.Array:
    kinds, brightness, phase, texture = jax.random.split(key, 4)
    kind = jax.random.bernoulli(kinds, 0.5, (count, 1, 1, 1))
    place = jnp.arange(SIDE) * 2 * jnp.pi / SIDE + jax.random.uniform(phase, (count, 1, 1, 1)) * 2 * jnp.pi
    wave = jnp.where(kind, jnp.sin(place), jnp.sin(2 * jnp.swapaxes(place, 2, 3)))
    mean = jnp.where(kind, 0.7, -0.7) + 0.3 * jax.random.normal(brightness, (count, 1, 1, 1))
    return mean + wave + 0.1 * jax.random.normal(texture, (count, 1, SIDE, SIDE))


def _init(key: jax.Array) -> dict[str, jax.Array]:
    sizes = {
        "in": (SIDE**2 + 64, WIDTH),
        "middle": (WIDTH, WIDTH),
        "late": (WIDTH + 64, WIDTH),
        "out": (WIDTH, SIDE**2),
    }
    keys = jax.random.split(key, len(sizes))
    return {
        name: jax.random.normal(k, size) * size[0] ** -0.5 for k, (name, size) in zip(keys, sizes.items(), strict=True)
    }


def _apply(weights: Any, noisy: jax.Array, told: jax.Array) -> jax.Array:
    angles = told[:, None] * 10_000.0 ** (-jnp.arange(32) / 32)
    time = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], 1)
    hidden = jax.nn.silu(jnp.concatenate([noisy.reshape(len(noisy), -1), time], 1) @ weights["in"])
    hidden = hidden + jax.nn.silu(hidden @ weights["middle"])
    hidden = hidden + jax.nn.silu(jnp.concatenate([hidden, time], 1) @ weights["late"])
    return (hidden @ weights["out"]).reshape(noisy.shape)


def _loss(process: Process, weights: Any, key: jax.Array, density: Density) -> jax.Array:
    data_key, time_key, noise_key = jax.random.split(key, 3)
    latents = _pictures(data_key, BATCH)
    keys, places = jax.random.split(time_key, BATCH), jnp.arange(BATCH)
    timesteps = jax.vmap(lambda k, place: process.draw_timestep(k, density, place, SIDE**2))(keys, places)
    return _errors(process, weights, latents, jax.random.normal(noise_key, latents.shape), timesteps).mean()


def _errors(process: Process, weights: Any, latents: jax.Array, noise: jax.Array, timesteps: jax.Array) -> jax.Array:
    noisy = jax.vmap(lambda x, n, t: add_noise(process, x, n, t))(latents, noise, timesteps)
    prediction = _apply(weights, noisy, jax.vmap(process.network_timestep)(timesteps).astype(jnp.float32))

    def error(prediction: jax.Array, latent: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        target = process.target(latent, noise, 0.0, t)
        return min_snr_weight(process, t, 0.0) * mean_squared_error(prediction, target)

    return jax.vmap(error)(prediction, latents, noise, timesteps)


def _trained(
    process: Process, density: Density, join: Callable[[Any], Any], begin: Any, steps: int, rate: float, key: jax.Array
) -> Any:
    optimizer = optax.adam(rate)

    def step(state: Any, key: jax.Array) -> tuple[Any, None]:
        params, opt_state = state
        gradients = jax.grad(lambda p: _loss(process, join(p), key, density))(params)
        updates, opt_state = optimizer.update(gradients, opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    return jax.lax.scan(step, (begin, optimizer.init(begin)), jax.random.split(key, steps))[0][0]


def _velocity_error(process: Process, weights: Any) -> jax.Array:
    count = 2048
    latents, noise = _pictures(jax.random.key(98), count), jax.random.normal(jax.random.key(99), (count, 1, SIDE, SIDE))
    return _errors(process, weights, latents, noise, jnp.linspace(0.03, 1.0, count)).mean()


@pytest.mark.slow
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_mapped_begins_lower_and_of_v_ends_lower(prediction_type: Any, capsys: pytest.CaptureFixture[str]) -> None:
    own = variance_preserving(1000, 0.00085, 0.012, prediction_type)
    processes = {"plain": Flow(), "mapped": MappedFlow(Flow(), own, prediction_type == "v_prediction")}
    density = Density("logit_normal")
    base = jax.jit(jax.vmap(lambda key: _trained(own, Density(), lambda w: w, _init(key), BASE_STEPS, 1e-3, key)))(
        jax.random.split(jax.random.key(0), SEEDS)
    )

    def adapters(key: jax.Array) -> Any:
        shapes = {name: value.shape for name, value in _init(key).items()}
        return {
            name: (jax.random.normal(key, (rows, RANK)) * rows**-0.5, jnp.zeros((RANK, columns)))
            for name, (rows, columns) in shapes.items()
        }

    def run(process: Process, is_whole: bool, base: Any, key: jax.Array) -> list[jax.Array]:
        def join(params: Any) -> Any:
            return params if is_whole else {n: base[n] + down @ up for n, (down, up) in params.items()}

        params, found = base if is_whole else adapters(key), []
        for number, (before, steps) in enumerate(zip((0, *AFTER), AFTER, strict=False)):
            if steps > before:
                part = jax.random.fold_in(key, number)
                params = _trained(process, density, join, params, steps - before, 3e-4 if is_whole else 1e-3, part)
            found.append(_velocity_error(process, join(params)))
        return found

    means = {}
    for name, process in processes.items():
        for is_whole in (True, False):
            errors = jax.jit(jax.vmap(lambda b, k, p=process, w=is_whole: run(p, w, b, k)))(
                base, jax.random.split(jax.random.key(1), SEEDS)
            )
            means[name, is_whole] = np.array(errors)
    with capsys.disabled():
        print(
            f"\n{prediction_type}: error of the velocity after {AFTER} steps; {SEEDS} seeds, mean and largest deviation"
        )
        for (name, is_whole), errors in means.items():
            cells = "  ".join(f"{row.mean():.3f} ± {np.abs(row - row.mean()).max():.3f}" for row in errors)
            print(f"{name:>7}, {'all weights' if is_whole else 'LoRA':<12}{cells}")
    for is_whole in (True, False):
        plain, mapped = (means[name, is_whole].mean(1) for name in ("plain", "mapped"))
        assert mapped[0] < 0.8 * plain[0]
        # Of ε an error counts up to 240 times (t = .936), which makes its training slow.
        assert plain[-1] < mapped[-1] if prediction_type == "epsilon" else (mapped < plain).all()
