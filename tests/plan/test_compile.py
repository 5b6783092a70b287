"""What is read of the compiler's files before it has ended, and what tells one compilation from another."""

import hashlib
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from offsetjax.plan import worker
from offsetjax.plan.compile import _allocated, _usage
from tests.plan import topology

ALLOCATIONS = """\
BufferAssignment:
allocation 0: size 32, thread-local:
 value: <1 add.1 @0> (size=32,offset=0): f32[]
allocation 1: size 1048576, parameter 0, shape |f32[512,512]| at ShapeIndex {}:
 value: <2 x @0> (size=1048576,offset=0): f32[512,512]{1,0:T(8,128)}
allocation 2: size 524288, maybe-live-out:
allocation 3: size 100, color 1, preallocated-temp:
allocation 4: size 24, color 2, preallocated-temp:
allocation 5: size 512, color 10, preallocated-temp:
allocation 6: size 197120, preallocated-temp:
allocation 7246: size 4096, constant:

Total bytes used: 9999999 (9.54MiB)
"""


def test_allocations_in_hbm_are_added_up_once_all_are_written(tmp_path: pathlib.Path) -> None:
    name = "module_0000.jit_step.after_optimizations"
    assert _allocated(tmp_path) is None
    allocations = tmp_path / f"{name}-buffer-assignment.txt"
    allocations.write_text(ALLOCATIONS[:200])  # it is still being written
    assert _allocated(tmp_path) is None
    allocations.write_text(ALLOCATIONS)
    assert _allocated(tmp_path) is None
    (tmp_path / f"{name}-buffer-assignment-values.txt").touch()
    assert _allocated(tmp_path) == 32 + 1048576 + 524288 + 197120 + 4096


def test_allocations_are_what_the_compiler_reports_in_the_end(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("libtpu")
    mesh = topology.mesh("v5e:2x2", (4,), ("x",))

    def step(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        def body(_: int, y: jax.Array) -> jax.Array:
            return jnp.tanh(y @ y.T) @ y

        return jax.lax.psum(jnp.sin(x @ x.T).sum(0), "x"), jax.lax.fori_loop(0, 9, body, x)

    sharded = jax.shard_map(step, mesh=mesh, in_specs=P("x"), out_specs=(P(), P("x")), check_vma=False)
    argument = jax.ShapeDtypeStruct((2048, 512), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    options = {"xla_dump_to": str(tmp_path), "xla_dump_hlo_as_text": True}
    jax.jit(sharded).lower(argument).compile(compiler_options=options)
    reported = _usage(tmp_path)
    assert reported is not None and reported > 2 * 512 * 512 * 4  # what it takes and what it gives
    assert _allocated(tmp_path) == reported


def test_flags_of_the_compiler_make_another_program(monkeypatch: pytest.MonkeyPatch) -> None:
    request = {"topology": "v5e:2x4", "num_slices": 1, "is_full": False}

    def key(**flags: str) -> str:
        for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in flags.items():
            monkeypatch.setenv(name, value)
        return worker._key("module {}", request, ["0.10.2", "0.10.2", "0.0.42"])

    text = 'module {}["v5e:2x4", 1, false, ["0.10.2", "0.10.2", "0.0.42"]]'
    plain = hashlib.sha256(text.encode()).hexdigest()[:32]  # as it was before flags counted
    assert key() == key(XLA_FLAGS="") == plain
    flags = ({"XLA_FLAGS": "--a"}, {"XLA_FLAGS": "--b"}, {"LIBTPU_INIT_ARGS": "--a"}, {"LIBTPU_INIT_ARGS": "--b"})
    assert len({plain, *(key(**each) for each in flags)}) == 5
