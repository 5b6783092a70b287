"""Every kernel attends as plain einsums do, and is taken only where it can be."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec as P

from offsetjax.models import attention
from offsetjax.parallel.sharding import mesh_of

LENGTH, HEADS = attention.SHORTEST, 2


def _inputs(channels: int, length: int = LENGTH) -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (jax.random.normal(each, (1, length, HEADS * channels)) for each in keys)
    return query, key, value


def _both(attend: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]]:
    """The output, and the gradients of a sum over it that weighs every element differently."""

    def run(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        output, pull = jax.vjp(attend, query, key, value)
        return output, pull(jnp.sin(jnp.arange(output.size, dtype=jnp.float32)).reshape(output.shape))

    return run


def _apart(these: jax.Array, those: jax.Array) -> float:
    return float(np.linalg.norm(these - those) / np.linalg.norm(those))


@pytest.mark.parametrize(
    ("channels", "length"),
    # Of Stable Diffusion 1.x's first blocks; of 2.x and XL; with blocks of 256, as the second ones at 768 px have them.
    [(40, LENGTH), (64, LENGTH), (16, LENGTH + 256)],
)
def test_the_pallas_kernel_gives_the_numbers_of_einsums(channels: int, length: int) -> None:
    def run(kernel: str) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        attend = lambda q, k, v: attention.attend(q, k, v, HEADS, kernel=kernel, interpret=True)  # noqa: E731
        return jax.jit(_both(attend))(*_inputs(channels, length))

    (output, gradients), (plain, plain_gradients) = run("splash"), run("xla")
    assert _apart(output, plain) < 1e-5
    for gradient, plain_gradient in zip(gradients, plain_gradients, strict=True):
        assert _apart(gradient, plain_gradient) < 1e-5


UNEQUAL = {  # positions of queries and of keys, heads of both, a causal mask, lengths of the examples
    "padded": (200, 300, 2, 2, False, None),
    "grouped": (256, 128, 4, 2, False, None),
    "lengths": (128, 384, 2, 1, False, (130, 7)),
    "all at once": (300, 300, 4, 2, True, (300, 41)),
}


def _unequal(name: str) -> tuple[tuple[np.ndarray, ...], dict[str, Any]]:
    length, context_length, heads, groups, is_causal, lengths = UNEQUAL[name]
    generator = np.random.default_rng(0)
    shapes = [(2, length, heads, 16), *[(2, context_length, groups, 16)] * 2]
    inputs = tuple(generator.standard_normal(shape).astype(np.float32) for shape in shapes)
    return inputs, {"is_causal": is_causal, "lengths": None if lengths is None else jnp.array(lengths)}


@pytest.mark.parametrize("name", UNEQUAL)
def test_the_pallas_kernel_takes_unequal_masked_padded_and_grouped_attention(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SHORTEST", 128)
    inputs, settings = _unequal(name)

    def run(kernel: str) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        attend = functools.partial(attention.attend_by_head, kernel=kernel, interpret=True, **settings)
        assert ("pallas_call" in str(jax.make_jaxpr(attend)(*inputs))) == (kernel == "splash")
        return jax.jit(_both(attend))(*inputs)

    (output, gradients), (plain, plain_gradients) = run("splash"), run("xla")
    assert _apart(output, plain) < 1e-5
    for gradient, plain_gradient in zip(gradients, plain_gradients, strict=True):
        assert _apart(gradient, plain_gradient) < 1e-5


@pytest.mark.parametrize("name", UNEQUAL)
def test_einsums_attend_as_pytorch_does(name: str) -> None:
    (query, key, value), settings = _unequal(name)
    length, context_length = query.shape[1], key.shape[1]
    seen = np.ones((2, 1, length, context_length), bool)
    if settings["is_causal"]:
        seen &= np.tri(length, context_length, dtype=bool)
    if settings["lengths"] is not None:
        seen &= (np.arange(context_length) < np.asarray(settings["lengths"])[:, None])[:, None, None]
    by_head = [torch.from_numpy(x).transpose(1, 2) for x in (query, key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *by_head, attn_mask=torch.from_numpy(seen), enable_gqa=True
    ).transpose(1, 2)
    heads = map(jnp.asarray, (query, key, value))
    assert _apart(attention.attend_by_head(*heads, **settings), expected.numpy()) < 1e-5


def test_heads_of_queries_that_do_not_divide_among_those_of_keys_are_refused() -> None:
    query, key, value = jnp.ones((1, 8, 3, 16)), *[jnp.ones((1, 8, 2, 16))] * 2
    with pytest.raises(ValueError, match="3 heads of queries are no multiple of 2 of keys"):
        attention.attend_by_head(query, key, value)


def test_heads_are_divided_among_the_devices_of_the_tensor_axis() -> None:
    mesh = mesh_of(data=1, fsdp=1, tensor=2)
    query, key, value = _inputs(16)

    def attend(kernel: str) -> jax.Array:
        local = lambda q, k, v: attention.attend(q, k, v, HEADS, kernel=kernel, interpret=True)  # noqa: E731
        on_devices = jax.shard_map(
            local, mesh=mesh, in_specs=P(), out_specs=P(), axis_names={"data", "fsdp"}, check_vma=False
        )
        return jax.jit(on_devices)(query, key, value)

    assert _apart(attend("splash"), attend("xla")) < 1e-5


def test_short_and_crossed_attention_and_masks_stay_with_einsums() -> None:
    for length in (LENGTH, 9216, 2304, 6400):  # of pictures of 768 px, of 640 px
        assert attention.takes_kernel("splash", length, length, 64)
    assert not attention.takes_kernel("splash", LENGTH, 77, 64)
    assert not attention.takes_kernel("splash", 9216, 77, 64)
    assert not attention.takes_kernel("splash", 256, 256, 64)
    assert attention.takes_kernel("splash", 7744, 7744, 64)  # of 704 px: padded
    assert attention.takes_kernel("splash", 4096, 512, 64)
    assert attention.takes_kernel("cudnn", 7744, 7744, 64)
    assert not attention.takes_kernel("cudnn", LENGTH, LENGTH, 160)
    assert not attention.takes_kernel("xla", LENGTH, LENGTH, 64)
    query, key, value = _inputs(16)
    mask = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
    masked = attention.attend(query, key, value, HEADS, kernel="splash", mask=mask)
    # The first position sees itself alone.
    np.testing.assert_allclose(masked[:, 0], value[:, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("setting", "platform", "dtype", "kernel"),
    [
        ("auto", "tpu", "float32", "splash"),
        ("auto", "tpu", "bfloat16", "splash"),
        ("auto", "gpu", "bfloat16", "cudnn"),
        ("auto", "gpu", "float32", "xla"),
        ("auto", "cpu", "bfloat16", "xla"),
        ("xla", "tpu", "bfloat16", "xla"),
    ],
)
def test_each_platform_has_its_kernel(setting: str, platform: str, dtype: str, kernel: str) -> None:
    assert attention.kernel_of(setting, platform, jnp.dtype(dtype)) == kernel


@pytest.mark.parametrize(
    ("setting", "platform", "dtype"),
    [
        ("splash", "cpu", "float32"),
        ("splash", "gpu", "bfloat16"),
        ("cudnn", "tpu", "bfloat16"),
        ("cudnn", "gpu", "float32"),
    ],
)
def test_a_kernel_that_the_platform_lacks_is_refused(setting: str, platform: str, dtype: str) -> None:
    with pytest.raises(ValueError, match=f"{setting} .* for .*, and this is a {platform}"):
        attention.kernel_of(setting, platform, jnp.dtype(dtype))
