"""What is read from compiled programs, against arithmetic: on virtual devices and for TPUs that are not there."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from offsetjax.plan import costs, hlo
from offsetjax.training import flops as flops_of
from tests.plan import topology

N = 1024
MESHES: dict[str, Callable[[], Mesh]] = {
    "cpu": lambda: jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2),
    "v5e": lambda: topology.mesh("v5e:2x4", (2, 4), ("data", "fsdp")),
}


@pytest.fixture(params=MESHES, scope="module")
def mesh(request: pytest.FixtureRequest) -> Mesh:
    if request.param != "cpu":
        pytest.importorskip("libtpu")
    return MESHES[request.param]()


def abstract(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def flops(module: hlo.Module) -> int:
    return sum(work.times * work.flops for work in costs.works(module))


def exchanged(module: hlo.Module) -> list[tuple[str, int, int, int, bool]]:
    return [(each.kind, each.times, each.num_bytes, len(each.group), each.is_dcn) for each in costs.collectives(module)]


def test_a_product_of_matrices(mesh: Mesh) -> None:
    module = topology.compiled(
        jnp.matmul, mesh, (P("data"), P(None, "fsdp")), P("data", "fsdp"), abstract(N, N), abstract(N, N)
    )
    assert flops(module) == 2 * N**3 // 8
    assert exchanged(module) == []


def test_what_a_product_moves_to_and_from_the_memory() -> None:
    pytest.importorskip("libtpu")
    one = topology.mesh("v5e:2x2", (4,), ("data",))
    module = topology.compiled(jnp.matmul, one, (P("data"), P()), P("data"), abstract(4 * N, 8 * N), abstract(8 * N, N))
    (work,) = (each for each in costs.works(module) if each.flops)
    moved = sum(each.times * each.hbm_bytes for each in costs.works(module))
    assert work.flops == 2 * N * 8 * N * N
    assert moved == 2 * (N * 8 * N + 8 * N * N + N * N)  # bfloat16; each array once


def test_a_scan_of_seven(mesh: Mesh) -> None:
    def seven(x, w):
        return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w)[0]

    module = topology.compiled(seven, mesh, (P("data"), P()), P("data"), abstract(N, N), abstract(7, N, N))
    assert flops(module) == 7 * 2 * N**3 // 2


def test_a_convolution(mesh: Mesh) -> None:
    def convolve(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    arguments = abstract(64, 16, 16, 128), abstract(3, 3, 128, 128)
    module = topology.compiled(convolve, mesh, (P(("data", "fsdp")), P()), P(("data", "fsdp")), *arguments)
    met = (3 * 16 - 2) ** 2  # of 48² the places that lie on the picture
    assert flops(module) == pytest.approx(8 * 2 * met * 128 * 128, rel=0.1)  # a TPU pads a little


def test_a_batch_of_products(mesh: Mesh) -> None:
    def attend(q, k):
        return jnp.einsum("bqhd,bkhd->bhqk", q, k)

    arguments = abstract(8, 256, 4, 64), abstract(8, 256, 4, 64)
    module = topology.compiled(attend, mesh, (P(("data", "fsdp")),) * 2, P(("data", "fsdp")), *arguments)
    assert flops(module) == 2 * 256 * 4 * 256 * 64


def test_an_all_gather_over_four(mesh: Mesh) -> None:
    gathered = jax.shard_map(
        lambda x: jax.lax.all_gather(x, "fsdp", axis=0, tiled=True),
        mesh=mesh,
        in_specs=P("fsdp"),
        out_specs=P(),
        check_vma=False,
    )
    module = topology.compiled(gathered, mesh, (P("fsdp"),), P(), abstract(N, N, dtype=jnp.float32))
    assert exchanged(module) == [("all-gather", 1, N * N * 4, 4, False)]


def test_a_reduction_in_a_loop(mesh: Mesh) -> None:
    def looped(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(jax.lax.psum(x, "data")), None), x, length=5)[0]

    reduced = jax.shard_map(looped, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    module = topology.compiled(reduced, mesh, (P("data"),), P("data"), abstract(2 * N, N, dtype=jnp.float32))
    assert exchanged(module) == [("all-reduce", 5, N * N * 4, 2, False)]


def test_a_reduced_share(mesh: Mesh) -> None:
    scattered = jax.shard_map(
        lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True),
        mesh=mesh,
        in_specs=P(),
        out_specs=P("fsdp"),
        check_vma=False,
    )
    module = topology.compiled(scattered, mesh, (P(),), P("fsdp"), abstract(N, N, dtype=jnp.float32))
    assert exchanged(module) == [("reduce-scatter", 1, N * N * 4, 4, False)]


def test_a_reduction_between_slices_goes_over_dcn() -> None:
    pytest.importorskip("libtpu")
    two = topology.mesh("v5e:2x2", (2, 4), ("data", "fsdp"), num_slices=2)
    reduced = jax.shard_map(lambda x: jax.lax.psum(x, "data"), mesh=two, in_specs=P("data"), out_specs=P())
    module = topology.compiled(reduced, two, (P("data"),), P(), abstract(2 * N, N, dtype=jnp.float32))
    assert exchanged(module) == [("all-reduce", 1, N * N * 4, 0, True)]


def test_precision_takes_more_passes() -> None:
    pytest.importorskip("libtpu")
    one = topology.mesh("v5e:2x2", (4,), ("data",))
    passes = {}
    for precision in ("default", "high", "highest"):
        module = topology.compiled(
            lambda x, y, precision=precision: jnp.matmul(x, y, precision=precision),
            one,
            (P("data"), P()),
            P("data"),
            *(abstract(N, N, dtype=jnp.float32),) * 2,
        )
        (passes[precision],) = {work.passes for work in costs.works(module) if work.flops}
    assert passes == {"default": 1, "high": 3, "highest": 6}


def test_a_loop_whose_length_is_not_known_counts_once() -> None:
    def until(x):
        return jax.lax.while_loop(lambda x: x.sum() < 10.0, lambda x: x @ x, x)

    module = hlo.parse(jax.jit(until).lower(abstract(64, 64, dtype=jnp.float32)).compile().as_text())
    (loop,) = (each for each in module.entry.instructions if each.opcode == "while")
    assert costs.trip_count(module, module.entry, loop) == 1


def test_a_kernel_counts_what_its_grid_does() -> None:
    pytest.importorskip("libtpu")
    one = topology.mesh("v5e:2x2", (4,), ("data",))
    length, heads, channels = 1024, 2, 64

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        mask = masks.MultiHeadMask([masks.FullMask((length, length))] * heads)
        return jax.vmap(splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1))(q, k, v).astype(jnp.float32)

    gradient = jax.shard_map(
        jax.grad(lambda *qkv: (attend(*qkv) ** 2).sum(), (0, 1, 2)),
        mesh=one,
        in_specs=P("data"),
        out_specs=P("data"),
        check_vma=False,
    )
    lowered = jax.jit(gradient).trace(*(abstract(4, heads, length, channels),) * 3)
    module = hlo.parse(lowered.lower().compile().as_text())
    kernels = flops_of.kernel_flops(lowered.jaxpr.jaxpr)
    assert len(kernels) == 3  # forward; the gradients of keys and values; that of queries
    # Two products forward; backward the scores and their gradient twice, and one for each of queries, keys and values.
    product = 2 * heads * length * length * channels
    work = [each for each in costs.works(module, kernels) if "tpu_custom_call" in each.instruction.attributes]
    assert sum(each.flops * each.times for each in work) == pytest.approx(9 * product, rel=1e-3)
    assert module.entry.root.opcode == "tuple"  # a kernel's metadata, which has lines of its own, ends nothing


def test_weights_that_are_gathered_while_others_are_used_count_once(mesh: Mesh) -> None:
    def layers(x: jax.Array, *weights: jax.Array) -> jax.Array:
        for weight in weights:
            x = jnp.sin(x @ jax.lax.all_gather(weight, "fsdp", axis=0, tiled=True))
        return x

    count, specs = 6, (P("data"), *(P("fsdp"),) * 6)
    sharded = jax.shard_map(layers, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=False)
    module = topology.compiled(sharded, mesh, specs, P("data"), abstract(8 * N, N), *(abstract(N, N),) * count)
    gathered = [each for each in costs.collectives(module) if each.kind == "all-gather"]
    if mesh.devices.flat[0].platform == "tpu":  # which spreads them over fusions, all with one number
        assert any("AsyncCollectiveStart" in each.attributes for _, each in instructions(module))
    assert sum(each.times for each in gathered) == count
    assert {(each.num_bytes, len(each.group)) for each in gathered} <= {
        (2 * N * N, 4),
        (4 * N * N, 4),
    }  # CPU: float32


def instructions(module: hlo.Module) -> list[tuple[str, hlo.Instruction]]:
    return [(name, each) for name, inner in module.computations.items() for each in inner.instructions]
