"""How tests compile: quickly, and once for all of a run; or as users do."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

# Compiling takes nearly all the time of a tiny training: do it with little care, and once for the same program.
QUICK_COMPILATION = {
    "jax_disable_most_optimizations": True,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@contextlib.contextmanager
def quick_compilation(base: pathlib.Path) -> Iterator[dict[str, str]]:
    """Compiles quickly inside, with a cache in `base`; gives the environment in which another process does the same.

    JAX_COMPILATION_CACHE_DIR names another place for the cache: that of all the tests of a run (conftest.py), or one
    that lasts from one run to the next.
    """
    cache_dir = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(base / "compiled")
    options = {**QUICK_COMPILATION, "jax_compilation_cache_dir": cache_dir}
    with _compiling(options):
        yield {name.upper(): str(value) for name, value in options.items()}


@contextlib.contextmanager
def usual_compilation() -> Iterator[None]:
    """Compiles inside as users do, and keeps nothing; here and in processes that are started from here."""
    usual = {"jax_disable_most_optimizations": False, "jax_compilation_cache_dir": None}
    before = {name.upper(): os.environ.pop(name.upper(), None) for name in usual}
    try:
        with _compiling(usual):
            yield
    finally:
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextlib.contextmanager
def _compiling(options: dict[str, Any]) -> Iterator[None]:
    before = {name: jax.config.values[name] for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # whether there is one is decided at the first compilation
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
