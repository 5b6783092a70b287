"""A plan of pictures of several sizes: memory of the largest, a step that is the mean over the steps of each."""

import io
import json
import pathlib
from typing import Any

import pytest
from rich.console import Console

from offsetjax.data.buckets import Size
from offsetjax.errors import UserError
from offsetjax.plan.command import plan
from offsetjax.plan.show import show
from offsetjax.plan.sizes import Share, joined, shares_of
from offsetjax.plan.stages import of_each_stage, whole
from tests.data.shapes import pictures_of_shapes
from tests.tiny import tiny_config

SEVERAL: dict[str, Any] = {"data__buckets": ("16x16", "24x16", "16x24"), "data__max_aspect": 2.0}


def of_size(total: int, step: float, batch: int, mfu: float, is_slowest_known: bool = True) -> dict[str, Any]:
    slowest = 2 * step if is_slowest_known else None
    steps = [step, slowest]
    memory = {"params": 1, "opt_state": 1, "ema_params": 1, "frozen": 1, "batch": 1, "temporary": total - 5}
    return {
        "topology": "v5e:2x2",
        "num_slices": 1,
        "chips": 4,
        "devices": 4,
        "mesh": {"data": 4},
        "bytes_per_device": {**memory, "total": total, "hbm": 100, "fits": total <= 100},
        "flops_per_device": {"model": 10 * step, "compiled": 12 * step},
        "global_batch_size": batch,
        "batch_per_device": batch / 4,
        "checkpoint_bytes": 7,
        "optimizer_bytes_a_parameter": 8.0,
        "collectives": [],
        "parameters": {"trained": 1, "frozen": 1},
        "seconds": {},
        "seconds_by_part": {},
        "step_seconds": steps,
        "images_per_second": [each and batch / each for each in steps],
        "mfu": [mfu, mfu / 2 if is_slowest_known else None],
        "hours": [each and each * 100 / 3600 for each in steps],
        "chip_hours": [each and each * 400 / 3600 for each in steps],
        "assumptions": ["a"],
        "compiled": {"is_full": False, "seconds": 10.0, "is_cached": False},
    }


def test_a_training_has_the_memory_of_its_largest_size_and_the_mean_of_its_steps() -> None:
    plans = [of_size(50, 1.0, 8, 0.4), of_size(80, 3.0, 4, 0.6)]
    found = joined(plans, [Share(Size(8, 8), 8, 0.75), Share(Size(16, 16), 4, 0.25)], "shares")
    assert found["bytes_per_device"]["total"] == 80 and found["bytes_per_device"]["fits"]
    assert found["step_seconds"] == [1.5, 3.0]  # .75 of 1 s and .25 of 3 s
    assert found["images_per_second"] == pytest.approx([7 / 1.5, 7 / 3.0])  # batches of 7 in the mean
    assert found["mfu"] == pytest.approx([(0.75 * 0.4 + 0.25 * 3 * 0.6) / 1.5, 0.25])
    assert found["hours"] == pytest.approx([1.5 * 100 / 3600, 300 / 3600])
    assert found["flops_per_device"]["model"] == 15.0 and found["compiled"]["seconds"] == 20.0
    assert [row["size"] for row in found["sizes"]] == ["8x8", "16x16"] and found["assumptions"] == ["a", "shares"]
    console = Console(width=140, file=io.StringIO())
    with console.capture() as shown:
        console.print(show([json.loads(json.dumps(found))]))
    text = shown.get()
    assert "75.0%" in text and "16x16" in text and "Assumed: " in text and "; shares." in text
    too_large = joined([plans[0], of_size(120, 3.0, 4, 0.6, False)], [Share(Size(8, 8), 8, 0.5)] * 2, "")
    assert too_large["bytes_per_device"]["fits"] is False and too_large["step_seconds"] == [2.0, None]
    assert too_large["mfu"][1] is None


def test_the_steps_of_a_size_are_those_that_its_pictures_make(tmp_path_factory: pytest.TempPathFactory) -> None:
    data = pictures_of_shapes(tmp_path_factory.getbasetemp())
    found, assumed = shares_of(tiny_config(data, **SEVERAL, train__global_batch_size=4))
    assert [(str(each.size), each.batch) for each in found] == [("16x24", 4), ("16x16", 4), ("24x16", 4)]
    assert [each.share for each in found] == pytest.approx([5 / 30, 10 / 30, 15 / 30]) and "its pictures" in assumed
    assert shares_of(tiny_config(data)) == ([], "")


def test_steps_of_parts_of_different_sizes_are_planned_by_their_mean(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    data = pictures_of_shapes(tmp_path_factory.getbasetemp())
    mixed: dict[str, Any] = {**SEVERAL, "data__mixed_sizes": True, "train__accumulate_steps": 2}
    found, assumed = shares_of(tiny_config(data, **mixed, train__global_batch_size=4))
    assert [(str(each.size), each.batch) for each in found] == [("16x24", 4), ("16x16", 4), ("24x16", 4)]
    assert [each.share for each in found] == pytest.approx([5 / 30, 10 / 30, 15 / 30]) and "differ in size" in assumed
    found, assumed = shares_of(tiny_config("", **mixed, data__equal_tokens=2))
    assert [each.batch for each in found] == [8, 4, 4] and "differ in size" in assumed


def test_without_data_sizes_that_are_given_are_planned_alike() -> None:
    found, assumed = shares_of(tiny_config("", data__buckets=("16x16", "8x8"), data__equal_tokens=2))
    assert [(str(each.size), each.batch, each.share) for each in found] == [("16x16", 8, 0.5), ("8x8", 32, 0.5)]
    assert "data.path is not there" in assumed
    with pytest.raises(
        UserError, match=r"plan: data\.bucket_count = 3 chooses sizes for the data, which cannot be read"
    ):
        shares_of(tiny_config("", data__bucket_count=3))
    with pytest.raises(UserError, match="24x15 must be multiples of 2"):
        shares_of(tiny_config("", data__buckets=("24x15",)))
    with pytest.raises(UserError, match=r"--search cannot apply with data\.equal_tokens"):
        plan(tiny_config("", data__equal_tokens=2), ["v5e:2x2"], searches=True)


STAGES = ("train.steps=30 data.resolution=8", "train.steps=10 data.buckets=('16x16', '24x16')")


def test_a_training_in_stages_has_the_sum_of_their_hours_and_the_memory_of_the_largest() -> None:
    stages, configs = zip(*of_each_stage(tiny_config("", train__stages=STAGES, train__steps=40)), strict=True)
    assert [each.train.steps for each in configs] == [30, 10] and configs[0].data.resolution == 8
    plans = [{**of_size(50, 1.0, 8, 0.4), "hours": [3.0, 6.0]}, {**of_size(120, 6.0, 4, 0.6), "hours": [6.0, None]}]
    found = whole(plans, stages)
    assert found["hours"] == [9.0, None] and found["bytes_per_device"]["total"] == 120
    assert found["bytes_per_device"]["fits"] is False and found["compiled"]["seconds"] == 20.0
    assert found["step_seconds"] == [9 * 3600 / 40, None]
    assert found["mfu"] == [pytest.approx((0.4 * 3 + 0.6 * 6) / 9), None]
    assert found["global_batch_size"] == 7 and found["images_per_second"] == [7 / (9 * 3600 / 40), None]
    rows = [(row["stage"], row["steps"], row["hours"]) for row in found["stages"]]
    assert rows == [(1, 30, [3, 6]), (2, 10, [6, None])]
    assert whole(plans[:1], stages[:1]) is plans[0]
    console = Console(width=140, file=io.StringIO())
    with console.capture() as shown:
        console.print(show([json.loads(json.dumps(found))]))
    assert "by stage" in shown.get() and "– (not known)" in shown.get()


@pytest.mark.slow
def test_each_size_of_each_stage_is_compiled(tmp_path: pathlib.Path) -> None:
    config = tiny_config("", train__stages=STAGES, train__steps=40, train__global_batch_size=4)
    [found] = plan(config, ["cpu:2"], cache_dir=str(tmp_path))
    small, large = found["stages"]
    assert small["bytes_per_device"]["total"] < large["bytes_per_device"]["total"] and len(large["sizes"]) == 2
    assert small["steps"] == 30 and found["bytes_per_device"]["total"] == large["bytes_per_device"]["total"]


@pytest.mark.slow
def test_each_size_is_compiled(tmp_path: pathlib.Path) -> None:
    config = tiny_config("", data__buckets=("16x16", "24x16"), train__global_batch_size=4)
    [found] = plan(config, ["cpu:2"], cache_dir=str(tmp_path))
    square, wide = found["sizes"]
    assert wide["bytes_per_device"] > square["bytes_per_device"] and found["global_batch_size"] == 4
    assert found["bytes_per_device"]["total"] == wide["bytes_per_device"]
    assert 1.4 < wide["model_flops_per_device"] / square["model_flops_per_device"] < 1.7
