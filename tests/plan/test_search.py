"""The search for the largest batch, on made-up machines."""

import pytest

from offsetjax.plan.search import largest_batch


@pytest.mark.parametrize("fixed", [0, 300, 999])
@pytest.mark.parametrize("each", [1, 7, 100])
@pytest.mark.parametrize("first", [1, 4, 64])
def test_where_memory_is_affine_the_answer_is_exact_and_quick(fixed: int, each: int, first: int) -> None:
    tried = []

    def total(batch: int) -> int:
        tried.append(batch)
        return fixed + each * batch

    batch, needs = largest_batch(total, 1000, first, fixed + each * first)
    best = (1000 - fixed) // each
    assert batch == best
    if best:
        assert needs == fixed + each * batch <= 1000
        assert batch in (first, *tried)  # measured, not only calculated
    assert len(tried) <= 4


def test_a_compiler_that_saves_memory_when_it_must_is_followed() -> None:
    def total(batch: int) -> int:  # ever less for a further example
        return 200 + 100 * batch if batch <= 4 else 600 + 40 * (batch - 4)

    batch, needs = largest_batch(total, 1000, 1, total(1))
    assert batch == 14
    assert needs == 1000


def test_a_model_that_does_not_fit_at_all() -> None:
    assert largest_batch(lambda batch: 5000 + batch, 1000, 8, 5008) == (0, 5001)


def test_measurements_are_few_whatever_happens() -> None:
    tried = []

    def total(batch: int) -> int:
        tried.append(batch)
        return 999 if batch < 1000 else 1001

    assert largest_batch(total, 1000, 1, 999)[0] >= 1
    assert len(tried) <= 6
