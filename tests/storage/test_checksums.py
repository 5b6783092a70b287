"""A checksum is the same on the host and on any mesh, and changes with any bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offsetjax.parallel import sharding
from offsetjax.storage import checksums

SHAPES = [(), (1,), (7, 3), (64, 32, 3), (2**20 + 5,)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_host_and_devices_agree(shape: tuple[int, ...], dtype: str) -> None:
    array = np.asarray(np.random.default_rng(0).normal(size=shape) * 1000).astype(jnp.dtype(dtype))
    assert checksums.of_tree({"x": jnp.asarray(array)}) == {"x": checksums.of_array(array)}


def test_every_mesh_gives_the_same() -> None:
    array = np.random.default_rng(0).normal(size=(64, 16, 8)).astype(np.float32)
    tree = {"a": {"kernel": array}}
    found = set()
    for data, fsdp in ((1, 1), (8, 1), (2, 4), (1, 8)):
        mesh = sharding.mesh_of(data=data, fsdp=fsdp)
        placed = jax.device_put(tree, sharding.shardings(mesh, (), tree))
        found.add(checksums.of_tree(placed)["a/kernel"])
    assert found == {checksums.of_array(array)}


def test_the_arrays_of_a_large_model_do_not_wait_for_each_other_for_ever() -> None:
    tree = {f"{number}/kernel": np.full((16, 16), number, np.float32) for number in range(600)}
    placed = jax.device_put(tree, sharding.shardings(sharding.mesh_of(data=2, fsdp=4), (), tree))
    assert checksums.of_tree(placed) == {name: checksums.of_array(array) for name, array in tree.items()}


def test_every_single_bit_counts() -> None:
    array = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    whole = checksums.of_array(array)
    rng = np.random.default_rng(1)
    for place, bit in zip(rng.integers(0, 1000, 500), rng.integers(0, 32, 500), strict=True):
        hurt = array.copy()
        hurt.view(np.uint32)[place] ^= np.uint32(1 << int(bit))
        assert checksums.of_array(hurt) != whole


@pytest.mark.parametrize("rows", [1, 3, 64, 1000])
def test_an_array_that_is_read_by_rows_has_the_same(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.random.default_rng(0).normal(size=(64, 7, 3)).astype(np.float32)
    monkeypatch.setattr(checksums, "_ROWS_ELEMENTS", rows * 21)
    monkeypatch.setattr(checksums, "_BLOCK", 50)
    expected, seen = checksums.of_array(array), []
    checksums.check_rows(lambda part: seen.append(part) or array[part], array.shape, expected, "a")
    assert len(seen) == -(-64 // rows)
    hurt = array.copy()
    hurt[63, 6, 2] += 1
    with pytest.raises(ValueError, match="a is damaged"):
        checksums.check_rows(hurt.__getitem__, array.shape, expected, "a")


def test_exchanged_words_and_zeroes_are_seen() -> None:
    array = np.random.default_rng(0).normal(size=4096).astype(np.float32)
    whole = checksums.of_array(array)
    exchanged = array.copy()
    exchanged[[3, 700]] = exchanged[[700, 3]]
    zeroed = array.copy()
    zeroed[1024:2048] = 0
    assert len({whole, checksums.of_array(exchanged), checksums.of_array(zeroed)}) == 3


def test_a_changed_array_is_named() -> None:
    tree = {"a": jnp.ones(3), "b": {"c": jnp.arange(4)}}
    expected = checksums.of_tree(tree)
    checksums.check({"b": tree["b"]}, expected)
    tree["b"]["c"] = tree["b"]["c"].at[2].set(7)
    with pytest.raises(ValueError, match="b/c is damaged"):
        checksums.check(tree, expected)
