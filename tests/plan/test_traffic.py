"""Bytes to and from HBM, a construct at a time, against what is worked out by hand; and of whole programs.

Each golden program has one operation in its entry. `S` is a stack of ten layers, f32[10,16,128]: 8 KiB a layer.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import PartitionSpec as P

from offsetjax.plan import costs, hlo
from tests.plan import topology

LAYER = 16 * 128 * 4
STACK, ONE, FLAT = "f32[10,16,128]{2,1,0:T(8,128)}", "f32[1,16,128]{2,1,0:T(8,128)}", "f32[16,128]{1,0:T(8,128)}"
ON_CHIP = "f32[1,16,128]{2,1,0:T(8,128)S(1)}"
INDEX = "s32[]{:T(128)}"
INDEX_BYTES = 4

SLICE = f"""
%slice (p: f32[10,16,128], i: s32[]) -> f32[16,128] {{
  %p = {STACK} parameter(0)
  %i = {INDEX} parameter(1)
  %zero = {INDEX} constant(0)
  %ds = {ONE} dynamic-slice(%p, %i, %zero, %zero), dynamic_slice_sizes={{1,16,128}}
  ROOT %b = {FLAT} bitcast(%ds)
}}
"""
UPDATE = f"""
%update (p: f32[10,16,128], u: f32[16,128], i: s32[]) -> f32[10,16,128] {{
  %p = {STACK} parameter(0)
  %u = {FLAT} parameter(1)
  %i = {INDEX} parameter(2)
  %zero = {INDEX} constant(0)
  %b = {ONE} bitcast(%u)
  ROOT %dus = {STACK} dynamic-update-slice(%p, %b, %i, %zero, %zero)
}}
"""
HEAD = f"""
ENTRY %main (s: f32[10,16,128], x: f32[16,128], i: s32[]) -> f32[] {{
  %s = {STACK} parameter(0)
  %x = {FLAT} parameter(1)
  %i = {INDEX} parameter(2)
"""


def moved(called: str, operation: str) -> int:
    """The bytes that the entry's last operation moves."""
    module = hlo.parse(f"HloModule golden\n{called}{HEAD}  ROOT {operation}\n}}\n")
    return sum(work.times * work.hbm_bytes for work in costs.works(module))


def fusion(body: str) -> tuple[str, str]:
    """A fusion of the entry's stack, layer and index, with this body, and the operation that calls it."""
    types = {"p": STACK, "x": FLAT, "i": INDEX}
    lines = [f"  %{name} = {shape} parameter({place})" for place, (name, shape) in enumerate(types.items())]
    (result,) = re.findall(r"ROOT %\S+ = (\(.*?\)|\S+) \w", body)
    text = "\n%fused () -> f32[] {\n" + "\n".join(lines) + body + "\n}\n"
    return text, f"%f = {result} fusion(%s, %x, %i), kind=kLoop, calls=%fused"


CASES = {
    "a slice in the fusion itself": (
        f"\n  %zero = {INDEX} constant(0)\n  %ds = {ONE} dynamic-slice(%p, %i, %zero, %zero)\n"
        f"  %b = {FLAT} bitcast(%ds)\n  ROOT %r = {FLAT} add(%b, %x)",
        3 * LAYER + INDEX_BYTES,
    ),
    "a slice in a nested fusion": (
        f"\n  %n = {FLAT} fusion(%p, %i), kind=kLoop, calls=%slice\n  ROOT %r = {FLAT} add(%n, %x)",
        3 * LAYER + INDEX_BYTES,
    ),
    "a slice in a nested fusion behind a bitcast": (
        f"\n  %c = {STACK} bitcast(%p)\n  %n = {FLAT} fusion(%c, %i), kind=kLoop, calls=%slice\n"
        f"  ROOT %r = {FLAT} add(%n, %x)",
        3 * LAYER + INDEX_BYTES,
    ),
    "two layers of one stack": (
        f"\n  %n = {FLAT} fusion(%p, %i), kind=kLoop, calls=%slice\n  %j = {INDEX} add(%i, %i)\n"
        f"  %m = {FLAT} fusion(%p, %j), kind=kLoop, calls=%slice\n  ROOT %r = {FLAT} add(%n, %m)",
        3 * LAYER + INDEX_BYTES,
    ),
    "a slice and the whole": (
        f"\n  %n = {FLAT} fusion(%p, %i), kind=kLoop, calls=%slice\n  %y = {FLAT} add(%n, %x)\n"
        f"  %h = {STACK} broadcast(%y), dimensions={{1,2}}\n  ROOT %r = {STACK} multiply(%h, %p)",
        10 * LAYER + LAYER + INDEX_BYTES + 10 * LAYER,
    ),
    "a slice of what is computed from the stack, as far as it is needed": (
        f"\n  %half = {STACK} negate(%p)\n  %n = {FLAT} fusion(%half, %i), kind=kLoop, calls=%slice\n"
        f"  ROOT %r = {FLAT} add(%n, %x)",
        3 * LAYER + INDEX_BYTES,
    ),
    "an element of a tuple": (
        f"\n  %n = {FLAT} fusion(%p, %i), kind=kLoop, calls=%slice\n  %t = ({FLAT}, {FLAT}) tuple(%n, %x)\n"
        f"  %e = {FLAT} get-tuple-element(%t), index=0\n  ROOT %r = {FLAT} negate(%e)",
        2 * LAYER + INDEX_BYTES,  # x is not read
    ),
    "a sum over a slice": (
        f"\n  %n = {FLAT} fusion(%p, %i), kind=kLoop, calls=%slice\n  %zero = f32[] constant(0)\n"
        f"  ROOT %r = f32[16]{{0:T(128)}} reduce(%n, %zero), dimensions={{1}}, to_apply=%sum",
        LAYER + INDEX_BYTES + 4 * 128,
    ),
    "an update in place": (
        f"\n  %zero = {INDEX} constant(0)\n  %b = {ONE} bitcast(%x)\n"
        f"  ROOT %r = {STACK} dynamic-update-slice(%p, %b, %i, %zero, %zero)",
        2 * LAYER + INDEX_BYTES,
    ),
    "an update in place in a nested fusion": (
        f"\n  ROOT %r = {STACK} fusion(%p, %x, %i), kind=kLoop, calls=%update",
        2 * LAYER + INDEX_BYTES,
    ),
    "an update in place in a nested fusion, beside another result": (
        f"\n  %y = {FLAT} negate(%x)\n  %n = {STACK} fusion(%p, %y, %i), kind=kLoop, calls=%update\n"
        f"  ROOT %r = ({STACK}, {FLAT}) tuple(%n, %y)",
        3 * LAYER + INDEX_BYTES,
    ),
    "a layer that is read, and replaced, in place": (
        f"\n  %n = {FLAT} fusion(%p, %i), kind=kLoop, calls=%slice\n  %y = {FLAT} add(%n, %x)\n"
        f"  ROOT %r = {STACK} fusion(%p, %y, %i), kind=kLoop, calls=%update",
        3 * LAYER + INDEX_BYTES,
    ),
    "an update of a new buffer": (
        f"\n  %z = f32[] constant(0)\n  %new = {STACK} broadcast(%z), dimensions={{}}\n"
        f"  ROOT %r = {STACK} fusion(%new, %x, %i), kind=kLoop, calls=%update",
        10 * LAYER + LAYER + INDEX_BYTES,
    ),
    "an update of what was changed": (
        f"\n  %new = {STACK} negate(%p)\n  ROOT %r = {STACK} fusion(%new, %x, %i), kind=kLoop, calls=%update",
        20 * LAYER + LAYER + INDEX_BYTES,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_fusion_reads_and_writes_what_its_results_need(name: str) -> None:
    body, expected = CASES[name]
    called, operation = fusion(body)
    assert moved(SLICE + UPDATE + called, operation) == expected


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (f"%r = {ONE} dynamic-slice(%s, %i, %i, %i), dynamic_slice_sizes={{1,16,128}}", 2 * LAYER),
        (f"%r = {ON_CHIP} dynamic-slice(%s, %i, %i, %i), dynamic_slice_sizes={{1,16,128}}", LAYER),
        (f"%r = ({STACK}, {ON_CHIP}, u32[]) slice-start(%s), slice={{[0:1],[0:16],[0:128]}}", LAYER),
        (f"%r = ({FLAT.replace(')}', ')S(1)}')}, {FLAT}, u32[]) copy-start(%x)", LAYER),
        (f"%r = {STACK} dynamic-update-slice(%s, %x, %i, %i, %i)", 2 * LAYER),
        (f"%r = {FLAT} negate(%x)", 2 * LAYER),
    ],
)
def test_an_operation_by_itself(operation: str, expected: int) -> None:
    assert moved("", operation) == expected


LAYERS, WIDTH, ROWS = 4, 1024, 131072


def _program(is_scanned: bool, is_recomputed: bool) -> Callable[[jax.Array, jax.Array], jax.Array]:
    def layer(x: jax.Array, w: jax.Array) -> jax.Array:
        return x @ w

    body = jax.checkpoint(layer) if is_recomputed else layer

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        if is_scanned:
            x = jax.lax.scan(lambda x, w: (body(x, w), None), x, w)[0]
        else:
            for i in range(LAYERS):
                x = body(x, w[i])
        return jnp.square(x.astype(jnp.float32)).mean()

    return jax.grad(loss)


def _counted(jaxpr: Jaxpr, times: int = 1) -> int:
    """Bytes of a program whose elementwise operations are all fused into its products of matrices.

    A product reads its operands and writes its result. What each turn of a loop stacks, for the backward pass or as a
    gradient, is read and written; where a layer is computed again, behind a barrier, its slices of a stack are cut out
    before: read and written too.
    """
    total = 0
    for equation in jaxpr.eqns:
        turns = times
        if equation.primitive.name == "dot_general":
            total += times * _bytes(*equation.invars, *equation.outvars)
        if equation.primitive.name == "scan":
            turns = times * equation.params["length"]
            body, carried = equation.params["jaxpr"].jaxpr, equation.params["num_carry"]
            cut = body.invars[equation.params["num_consts"] + carried :]
            again = [name for each in body.eqns if each.primitive.name == "remat2" for name in each.invars]
            total += 2 * turns * _bytes(*body.outvars[carried:], *(each for each in cut if each in again))
        for value in equation.params.values():
            if isinstance(value, ClosedJaxpr | Jaxpr):
                total += _counted(getattr(value, "jaxpr", value), turns)
    return total


def _bytes(*variables: Any) -> int:
    return sum(variable.aval.size * variable.aval.dtype.itemsize for variable in variables)


@pytest.mark.parametrize("is_recomputed", [False, True])
@pytest.mark.parametrize("is_scanned", [False, True])
def test_the_traffic_of_layers_is_that_of_their_products(is_scanned: bool, is_recomputed: bool) -> None:
    pytest.importorskip("libtpu")
    one = topology.mesh("v5e:2x2", (4,), ("data",))
    program = _program(is_scanned, is_recomputed)
    weights = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.bfloat16)
    rows = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.bfloat16)  # more than fits on the chip
    local = jax.shard_map(program, mesh=one, in_specs=(P(), P()), out_specs=P(), check_vma=False)
    module = topology.compiled(local, one, (P(), P()), P(), weights, rows)
    counted = _counted(jax.make_jaxpr(program)(weights, rows).jaxpr)
    # The compiler copies what a loop carries, which no jaxpr says.
    moved = sum(each.times * each.hbm_bytes for each in costs.works(module) if each.instruction.opcode != "copy")
    assert moved == pytest.approx(counted, rel=0.1)
