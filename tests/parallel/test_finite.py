"""Whether a tree is finite: its answer, and that a program which asks for it stays small."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offsetjax.parallel.finite import all_finite


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_found_among_integers_and_large_ones(bad: float) -> None:
    tree = {"a": jnp.full(3, 1e38), "b": {"c": jnp.zeros((2, 2)), "step": jnp.int32(7)}}
    assert all_finite(tree)
    assert not all_finite({**tree, "b": {"c": jnp.zeros((2, 2)).at[1, 0].set(bad)}})


def test_a_program_that_chooses_by_it_grows_with_the_number_of_arrays_and_not_with_its_square() -> None:
    """On one device, where the compiler may copy the question to each place that reads its answer."""

    def lines(count: int) -> int:
        def chosen(new: list[jax.Array], old: list[jax.Array]) -> list[jax.Array]:
            is_finite = all_finite(new)
            return [jnp.where(is_finite, one, other) for one, other in zip(new, old, strict=True)]

        arrays = [jax.ShapeDtypeStruct((4 + place,), jnp.float32) for place in range(count)]
        return len(jax.jit(chosen).lower(arrays, arrays).compile().as_text().splitlines())

    assert lines(80) < 2.5 * lines(40)
