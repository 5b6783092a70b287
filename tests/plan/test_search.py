"""The search for the largest batch, on made-up machines."""

import pathlib
from typing import Any

import pytest

from offsetjax.plan import command
from offsetjax.plan.compile import Request
from offsetjax.plan.search import largest_batch
from tests.tiny import tiny_config


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


@pytest.mark.parametrize("apart", [0, 50])  # what the batch takes at once, however large
@pytest.mark.parametrize("first", [2, 8, 200])
def test_what_no_batch_changes_is_known_so_that_few_measurements_do(first: int, apart: int) -> None:
    tried = []

    def total(batch: int) -> int:
        tried.append(batch)
        return 300 + apart + 7 * batch

    assert largest_batch(total, 1000, first, 300 + apart + 7 * first, fixed_bytes=300)[0] == (700 - apart) // 7
    assert len(tried) <= (2 if apart else 1)


def test_a_compiler_that_saves_memory_when_it_must_is_followed() -> None:
    def total(batch: int) -> int:  # ever less for a further example
        return 200 + 100 * batch if batch <= 4 else 600 + 40 * (batch - 4)

    batch, needs = largest_batch(total, 1000, 1, total(1))
    assert batch == 14
    assert needs == 1000


def test_a_compiler_that_saves_memory_near_the_limit_only_leads_nowhere_far() -> None:
    measured = {8: 550}

    def total(batch: int) -> int:  # affine, but for what is saved between 14 and 18
        measured[batch] = 900 if 14 <= batch <= 18 else 150 + 50 * batch
        return measured[batch]

    assert largest_batch(total, 1000, 8, 550, fixed_bytes=100)[0] == 18
    assert len(measured) <= 1 + 5


def test_a_larger_batch_that_takes_less_says_nothing_of_the_rest() -> None:
    measured = {4: 60}

    def total(batch: int) -> int:
        measured[batch] = 6 * batch if batch <= 130 else 770 if batch <= 140 else 6 * batch
        return measured[batch]

    assert largest_batch(total, 800, 4, 60, fixed_bytes=20)[0] == 140
    assert max(measured) <= 8 * 140


def test_a_model_that_does_not_fit_at_all() -> None:
    assert largest_batch(lambda batch: 5000 + batch, 1000, 8, 5008) == (0, 5001)


@pytest.mark.parametrize("first", [1, 7, 999, 1000, 5001])
@pytest.mark.parametrize("last", [0, 1, 2, 999])
def test_measurements_are_few_and_the_answer_is_one_whatever_happens(first: int, last: int) -> None:
    measured = {}

    def total(batch: int) -> int:  # steps tell nothing of where they are
        measured[batch] = 999 if batch <= last else 1001
        return measured[batch]

    batch, needs = largest_batch(total, 1000, first, total(first))
    assert len(measured) <= 1 + 6
    if last:
        assert 1 <= batch <= last
        assert measured[batch] == needs <= 1000
    else:
        assert (batch, needs) == (0, measured[1])


@pytest.mark.parametrize(
    ("mesh", "accumulate", "batch", "largest"),
    [
        ({"data": 2, "fsdp": 4, "tensor": 1}, 1, 24, 72),
        ({"data": 2, "fsdp": 1, "tensor": 4}, 1, 6, 78),  # less than an example a device
        ({"data": 1, "fsdp": 4, "tensor": 2}, 1, 12, 76),  # no multiple of the devices
        ({"data": 1, "fsdp": 4, "tensor": 2}, 3, 12, 72),
        ({"data": 1, "fsdp": 4, "tensor": 2}, 1, 100, 76),
    ],
)
def test_what_is_reported_was_measured(
    monkeypatch: pytest.MonkeyPatch, mesh: dict[str, int], accumulate: int, batch: int, largest: int
) -> None:
    measured = {}

    def fake(request: Request, compiled: Any = None) -> dict[str, Any]:
        batch = request.config.train.global_batch_size
        measured[batch] = 210 + 10 * batch  # 79 fit into 1000
        kept = {"params": 50, "opt_state": 100, "ema_params": 50, "frozen": 10}
        memory = {**kept, "total": measured[batch], "hbm": 1000}
        return {"mesh": mesh, "devices": 8, "global_batch_size": batch, "bytes_per_device": memory}

    monkeypatch.setattr(command, "_compile", lambda request: None)
    monkeypatch.setattr(command, "estimate", fake)
    config = tiny_config(train__global_batch_size=batch, train__accumulate_steps=accumulate)
    request = Request(config, "v5e:2x4", 1, False, pathlib.Path())
    found = command._search(request, fake(request))
    assert found == {"global_batch_size": largest, "batch_per_device": largest / 8, "total": measured[largest]}
    shares = mesh["data"] * mesh["fsdp"] * accumulate
    assert all(batch % shares == 0 for batch in measured)
