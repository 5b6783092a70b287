"""The process that traces and compiles: `python -m offsetjax.plan.worker` with a request on its standard input.

It writes one line of JSON for each thing that it has found out, and ends at once when its standard input is closed,
which is when the process that started it has ended, however that came about.
"""

import hashlib
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np
from jax.experimental import topologies
from jaxtyping import PyTree

from offsetjax.config import from_json
from offsetjax.data.buckets import Size
from offsetjax.errors import UserError
from offsetjax.json_text import parse_object
from offsetjax.parallel import sharding
from offsetjax.parallel.chips import Chip, chip_named
from offsetjax.plan.program import Program, architecture, make_program
from offsetjax.training.abstract import abstract_frozen, model_flops
from offsetjax.training.flops import kernel_flops


def main() -> None:
    """Answers one request; see `compile.Request`."""
    request = parse_object(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        _answer(request)
    except UserError as error:
        _say(user_error=str(error))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _say(does_not_fit=" ".join(str(error).split()))


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def _say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def _answer(request: dict[str, Any]) -> None:
    devices = _devices(request["topology"], request["num_slices"])
    _say(phase="tracing the step")
    size = Size(*request["size"]) if request["size"] else None
    program = make_program(architecture(from_json(request["config"])), devices, size, request["count"])
    traced = program.step.trace(*program.arguments)
    _say(phase="lowering")
    lowered = traced.lower()
    versions = [jax.__version__, jaxlib.__version__, _libtpu_version()]
    key = _key(lowered.as_text(), request, versions)
    _say(
        facts={
            **_facts(program),
            "model_flops": model_flops(program.config, program.pipeline, size, request["count"]),
            "kernels": [[*kernel, flops] for kernel, flops in kernel_flops(traced.jaxpr.jaxpr).items()],
            "key": key,
            "versions": versions,
        }
    )
    if (Path(request["cache_dir"]) / f"{key}.json").exists():
        return
    _say(phase="compiling")
    is_tpu = not request["topology"].startswith("cpu")
    dump = {"xla_dump_to": request["dump_dir"], "xla_dump_hlo_as_text": True} if is_tpu else {}
    compiled = lowered.compile(compiler_options=dump)
    (Path(request["dump_dir"]) / "compiled.txt").write_text(compiled.as_text())
    memory = compiled.memory_analysis()
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    _say(compiled=int(used + memory.temp_size_in_bytes))


def _key(program: str, request: dict[str, Any], versions: list[str]) -> str:
    """What makes a compilation another one: the program, and all that changes what the compiler makes of it."""
    asked = [request["topology"], request["num_slices"], request["is_full"], versions]
    if flags := {name: os.environ[name] for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS") if os.environ.get(name)}:
        asked.append(flags)
    return hashlib.sha256((program + json.dumps(asked)).encode()).hexdigest()[:32]


def _devices(topology: str, num_slices: int) -> list[Any]:
    generation, _, shape = topology.partition(":")
    if generation == "cpu":
        jax.config.update("jax_num_cpu_devices", int(shape))
        return list(jax.devices("cpu"))
    options: dict[str, Any] = {"num_slices": num_slices} if num_slices > 1 else {}
    if generation == "v4":  # as its machines run it: both cores of a chip are one device
        options["chip_config_name"] = "megacore"
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except Exception as error:  # libtpu raises several kinds for a shape that it does not know
        examples = ", ".join(_chip(generation).examples)
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:100]
        raise UserError(f"plan: {topology} cannot be had ({reason}); some that can: {examples}") from error
    return list(description.devices)


def _chip(generation: str) -> Chip:
    chip = chip_named(generation)
    if chip is None:
        raise UserError(f"plan: no chip {generation!r} is known")
    return chip


def _libtpu_version() -> str:
    try:
        import libtpu

        return str(libtpu.__version__)
    except ImportError:
        return ""


def _facts(program: Program) -> dict[str, Any]:
    """What is known before anything is compiled; bytes are one device's unless the name says otherwise."""
    config, (state, frozen, batch) = program.config, program.arguments
    state_at, frozen_at, batch_at = program.shardings
    # Beside what the step takes: an autoencoder that only draws, where latents are cached.
    idle = {part: tree for part, tree in abstract_frozen(program.pipeline).items() if part not in frozen}
    devices = program.mesh.devices.flat
    return {
        "parts": list(program.pipeline.parts),
        "mesh": dict(program.mesh.shape),
        "num_devices": int(program.mesh.size),
        "device_kind": devices[0].device_kind,
        "coordinates": [list(getattr(device, "coords", ())) for device in devices],
        "trained_parameters": _elements(state.params),
        "frozen_parameters": _elements(frozen),
        "params_bytes": _local_bytes(state.params, state_at.params),
        "opt_state_bytes": _local_bytes(state.opt_state, state_at.opt_state),
        "ema_params_bytes": _local_bytes(state.ema_params, state_at.ema_params),
        "frozen_bytes": _local_bytes(frozen, frozen_at),
        "idle_bytes": _local_bytes(idle, sharding.shardings(program.mesh, program.pipeline.sharding, idle)),
        "batch_bytes": _local_bytes(batch, batch_at),
        "checkpoint_bytes_in_all": _bytes(state),
        "opt_state_bytes_in_all": _bytes(state.opt_state),
        "global_batch_size": batch["is_truncated"].shape[0],
        "accumulate_steps": config.train.accumulate_steps,
        "steps": config.train.steps,
    }


def _elements(tree: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _bytes(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _local_bytes(tree: PyTree, shardings: PyTree) -> int:
    def local(leaf: Any, sharding: Any) -> int:
        return int(np.prod(sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(local, tree, shardings)))


if __name__ == "__main__":
    main()
