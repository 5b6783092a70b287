"""Matrix FLOPs against arithmetic, and against a convolution of ones, whose sum counts its products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from offsetjax.training.flops import count_flops, window_products


def abstract(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_a_product_of_matrices() -> None:
    assert count_flops(jnp.matmul, abstract(3, 5), abstract(5, 7)) == 2 * 3 * 5 * 7
    batched = functools.partial(jnp.einsum, "bij,bjk->bik")
    assert count_flops(batched, abstract(11, 3, 5), abstract(11, 5, 7)) == 11 * 2 * 3 * 5 * 7


def test_what_is_elementwise_counts_nothing() -> None:
    assert count_flops(lambda x: jnp.exp(x) + x * x, abstract(64, 64)) == 0


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.checkpoint], ids=["plain", "jit", "checkpoint"])
def test_the_backward_pass_is_two_more_products(transform) -> None:
    def loss(w, x):
        return jnp.sin(transform(jnp.matmul)(x, w)).sum()

    assert count_flops(loss, abstract(5, 7), abstract(3, 5)) == 2 * 3 * 5 * 7
    both = count_flops(jax.grad(loss, (0, 1)), abstract(5, 7), abstract(3, 5))
    assert both == 3 * 2 * 3 * 5 * 7


def test_what_is_computed_again_counts_again() -> None:
    def block(x, w):
        return jnp.sin(jnp.sin(x @ w) @ w)

    def gradient(block):
        return jax.grad(lambda x, w: block(x, w).sum(), (0, 1))

    product = 2 * 8**3
    assert count_flops(gradient(block), abstract(8, 8), abstract(8, 8)) == 6 * product
    # The sine's derivative needs both products once more.
    assert count_flops(gradient(jax.checkpoint(block)), abstract(8, 8), abstract(8, 8)) == 8 * product


def test_loops_count_as_often_as_they_run_and_branches_by_the_largest() -> None:
    def scanned(x, w):
        return jax.lax.scan(lambda x, _: (jax.lax.scan(lambda x, _: (x @ w, None), x, length=3)[0], None), x, length=5)

    assert count_flops(scanned, abstract(4, 4), abstract(4, 4)) == 5 * 3 * 2 * 4**3
    assert count_flops(lambda x: jax.lax.fori_loop(0, 6, lambda _, x: x @ x, x), abstract(4, 4)) == 6 * 2 * 4**3
    branches = (lambda x: x @ x, lambda x: x @ x @ x, jnp.sin)
    assert count_flops(lambda x, i: jax.lax.switch(i, branches, x), abstract(4, 4), 0) == 2 * 2 * 4**3


def test_a_custom_derivative_is_counted_where_it_is_taken() -> None:
    @jax.custom_vjp
    def square(x):
        return x @ x

    square.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x @ x,))
    assert count_flops(square, abstract(4, 4)) == 2 * 4**3
    assert count_flops(jax.grad(lambda x: square(x).sum()), abstract(4, 4)) == 3 * 2 * 4**3


def test_all_devices_of_a_shard_map_count() -> None:
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    shared = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P(("data", "fsdp")), P()), out_specs=P(("data", "fsdp")))
    assert count_flops(shared, abstract(16, 5), abstract(5, 7)) == 2 * 16 * 5 * 7


def test_a_kernel_counts_by_its_own_estimate_or_by_its_grid() -> None:
    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...] @ x_ref[...]

    blocks = pl.BlockSpec((8, 8), lambda i: (i, 0))
    call = functools.partial(
        pl.pallas_call, kernel, grid=(4,), in_specs=[blocks], out_specs=blocks, out_shape=abstract(32, 8)
    )
    assert count_flops(call(), abstract(32, 8)) == 4 * 2 * 8**3
    told = pl.CostEstimate(flops=123, transcendentals=0, bytes_accessed=0)
    assert count_flops(call(cost_estimate=told), abstract(32, 8)) == 123


CONVOLUTIONS = [
    {"window_strides": (1, 1), "padding": ((0, 0), (0, 0))},
    {"window_strides": (2, 3), "padding": ((1, 1), (0, 1))},
    {"window_strides": (1, 2), "padding": ((5, 2), (-1, 3)), "rhs_dilation": (2, 1)},
    {"window_strides": (2, 1), "padding": ((1, 2), (2, 2)), "lhs_dilation": (3, 2), "rhs_dilation": (1, 2)},
]


@pytest.mark.parametrize("settings", CONVOLUTIONS, ids=str)
def test_a_convolution_counts_the_products_that_meet_an_input(settings) -> None:
    convolve = functools.partial(jax.lax.conv_general_dilated, **settings)
    x, w = abstract(2, 4, 11, 9), abstract(6, 4, 3, 2)
    products = float(convolve(jnp.ones((1, 1, 11, 9)), jnp.ones((1, 1, 3, 2))).sum())
    assert count_flops(convolve, x, w) == 2 * products * 2 * 4 * 6
    # Each product gives one to the gradient of each of its factors.
    gradient = jax.grad(lambda x, w: (convolve(x, w) ** 2).sum(), (0, 1))
    assert count_flops(gradient, x, w) == 3 * 2 * products * 2 * 4 * 6


def test_groups_of_a_convolution_do_not_meet() -> None:
    convolve = functools.partial(
        jax.lax.conv_general_dilated, window_strides=(1, 1), padding="VALID", feature_group_count=2
    )
    assert count_flops(convolve, abstract(1, 4, 5, 5), abstract(6, 2, 3, 3)) == 2 * 9 * 9 * 2 * 6


def test_one_axis_against_counting() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        inputs, outputs, size, stride, hole, dilation = (int(x) for x in rng.integers(1, 6, 6))
        pad = int(rng.integers(-2, 5))
        met = [
            (o, k)
            for o in range(outputs)
            for k in range(size)
            if 0 <= (place := o * stride + k * dilation - pad) <= (inputs - 1) * hole and place % hole == 0
        ]
        counted = window_products(
            inputs, outputs, size=size, stride=stride, pad=pad, input_dilation=hole, kernel_dilation=dilation
        )
        assert counted == len(met)


def test_a_batch_written_as_an_axis_is_counted_at_once() -> None:
    # As a TPU's compiler writes products of matrices: each example meets itself alone.
    count = 2**17
    assert window_products(count, count, size=count, stride=count - 1, input_dilation=count) == count
