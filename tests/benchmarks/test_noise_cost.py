"""What noise costs beside plain noise: `launch/local.sh test tests/benchmarks -m slow -s -k cost` prints them.

The programs are timed in turns, for timings on one machine drift together.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offsetjax.diffusion.noise import Noise, offset_noise
from offsetjax.diffusion.spectrum import formula_spectrum, pyramid_spectrum

BATCH, SHAPE, ROUNDS = 256, (4, 128, 128), 9


def _drawn(noise: Noise) -> Callable[[jax.Array], jax.Array]:
    return lambda keys: jax.vmap(lambda key: noise.draw(key, jnp.zeros(SHAPE), jnp.int32(500)))(keys)


def _coloured(spectrum: Callable[[int, int], np.ndarray]) -> Callable[[jax.Array], jax.Array]:
    return _drawn(Noise("spectral", np.zeros(1), spectrum=lambda h, w: spectrum(h, w)[None]))


@pytest.mark.slow
def test_the_cost_of_noise_beside_that_of_normal_numbers() -> None:
    programs = {
        "jax.random.normal": lambda keys: jax.random.normal(keys[0], (BATCH, *SHAPE)),
        "offset_noise": lambda keys: jax.vmap(lambda key: offset_noise(key, jnp.zeros(SHAPE), 0.1))(keys),
        "offset": _drawn(Noise("offset", np.array([0.1]))),
        "spectral": _coloured(lambda h, w: formula_spectrum("1 + 0.02 / (f + 0.01) ** 2", h, w)),
        "pyramid": _coloured(lambda h, w: pyramid_spectrum(h, w, 0.3, 6)),
    }
    keys = jax.random.split(jax.random.key(0), BATCH)
    on_one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    compiled = {name: jax.jit(draw, out_shardings=on_one_device) for name, draw in programs.items()}
    times: dict[str, list[float]] = {name: [] for name in compiled}
    for draw in compiled.values():
        jax.block_until_ready(draw(keys))
    for _ in range(ROUNDS):
        for name, draw in compiled.items():
            begin = time.perf_counter()
            jax.block_until_ready(draw(keys))
            times[name].append(time.perf_counter() - begin)
    plain = np.median(times["jax.random.normal"])
    ratios = {name: float(np.median(each) / plain) for name, each in times.items()}
    for name, ratio in ratios.items():
        print(f"{name:>18}  {ratio:.2f}  ({np.median(times[name]) * 1e3:.0f} ms)")
    assert ratios["offset_noise"] <= 1.1 and ratios["offset"] <= 1.1
    assert ratios["spectral"] <= 2.0 and ratios["pyramid"] <= 2.0
