"""Reports of several runs: seeds taken together, what was varied, and runs that have little in common."""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from offsetjax.config import default_config, flatten
from offsetjax.config.presets import stable_diffusion_xl
from offsetjax.config.schema import fields, is_indifferent
from offsetjax.errors import UserError
from offsetjax.report.pool import pool
from offsetjax.report.read import read_runs
from offsetjax.report.swept import find_series, sentences
from tests.report.test_report import GREY, SKI, SQUARE, WIDE, _run, _workdir, data

__all__ = ["data"]  # a fixture


def _sweep(folder: pathlib.Path, points: Mapping[str, Mapping[str, Any]], samples: Any = None) -> str:
    """A folder of work directories, a run a point; its samples get brighter with the strength."""
    for name, changes in points.items():
        strength = changes.get("noise.offset_strength", 0.1)
        drawn = {SQUARE: (0.5 - strength,), SKI: (0.5 + strength,)}
        _workdir(folder / name, strength, samples or {0: GREY, 100: drawn}, changes=changes)
    return str(folder)


FOUR = {
    f"offset_strength={strength},seed={seed}": {"noise.offset_strength": strength, "seed": seed}
    for strength in (0.0, 0.2)
    for seed in (0, 1)
}


def test_runs_that_differ_in_their_seed_alone_are_one(tmp_path: pathlib.Path, data: Any) -> None:
    numbers, html = _run(tmp_path, _sweep(tmp_path / "runs", FOUR))
    assert [run["name"] for run in numbers["runs"]] == list(FOUR)
    assert [(each["name"], each["runs"]) for each in numbers["pools"]] == [
        (f"offset_strength={strength} (2 seeds)", [name for name in FOUR if f"={strength}," in name])
        for strength in ("0.0", "0.2")
    ]
    assert numbers["pools"][1]["after"]["prompts"][SKI] == {
        "mean": pytest.approx(0.7, abs=0.01), "std": 0.0, "count": 2
    }  # fmt: skip
    assert numbers["config_differences"] == {"noise.offset_strength": [0.0, 0.0, 0.2, 0.2], "seed": [0, 1, 0, 1]}
    assert "<td class='text'>seed</td><td class='text'>0, 1</td><td class='text'>0, 1</td>" in html
    assert numbers["conclusions"][0] == (
        "noise.offset_strength 0, 0.2: the range of the prompts' mean brightness is 0.00, 0.40; it is widest at 0.2."
    )
    assert {"swept.png", "headline.png", "losses.png", "after_1.png"} <= {
        path.name for path in (tmp_path / "page_files").iterdir()
    }
    assert not (tmp_path / "page_files" / "after_2.png").exists()


@pytest.mark.parametrize("field", ["mesh.fsdp", "checkpoint.every_steps", *filter(is_indifferent, fields())])
def test_seeds_are_averaged_whatever_machine_they_ran_on(tmp_path: pathlib.Path, data: Any, field: str) -> None:
    default = dict(flatten(default_config()))[field]
    other = {bool: not default, int: 7, float: 7.5, str: "another", tuple: (20, 24)}[type(default)]
    _sweep(tmp_path / "runs", {"seed=0": {"seed": 0}, "seed=1": {"seed": 1, field: other}})
    assert len(pool(read_runs([str(tmp_path / "runs")]))) == 1


def test_the_same_training_twice_is_no_seed_of_another(tmp_path: pathlib.Path, data: Any) -> None:
    runs = [_workdir(tmp_path / name, 0.1, {}) for name in ("a", "b")]
    assert [each["name"] for each in _run(tmp_path, *runs)[0]["pools"]] == ["a", "b"]


def test_a_curve_is_the_mean_of_the_runs_with_their_range(tmp_path: pathlib.Path, data: Any) -> None:
    _sweep(tmp_path / "runs", FOUR)
    file = tmp_path / "runs" / "offset_strength=0.2,seed=1" / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines = [{**line, "loss": 3 * line["loss"]} for line in lines[:6]] + [{"step": 61, "loss": 1.0}]  # still running
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    pools = pool(read_runs([str(tmp_path / "runs")]))
    curve = pools[1].curve("loss")
    assert curve is not None
    steps = np.arange(10, 61, 10)
    np.testing.assert_array_equal(curve.steps, steps)
    for values, factor in ((curve.low, 1), (curve.mean, 2), (curve.high, 3)):
        np.testing.assert_allclose(values, factor / steps)
    assert pools[1].curve("validation_plain") is None
    numbers, _ = _run(tmp_path, str(tmp_path / "runs"))
    assert "offset_strength=0.2,seed=1: 61 of 100 steps are done" in " ".join(numbers["conclusions"])


def test_two_fields_that_are_varied_make_a_series_each_value_of_the_other(tmp_path: pathlib.Path, data: Any) -> None:
    points = {
        f"rank={rank},rate={rate}": {"lora.rank": rank, "optimizer.learning_rate": rate}
        for rank in (4, 16, 8)
        for rate in (1e-4, 1e-3)
    }
    series = find_series(pool(read_runs([_sweep(tmp_path / "runs", points)])))
    assert [(each.field, each.values, each.others) for each in series] == [
        ("lora.rank", (4, 8, 16), {"optimizer.learning_rate": rate}) for rate in (1e-4, 1e-3)
    ]
    assert all("lora.rank 4, 8, 16, optimizer.learning_rate 0.00" in text for text in sentences(series))


@pytest.mark.parametrize(
    "changes",
    [
        {"noise.kind": "adjusted"},  # no number
        {"lora.rank": 4, "optimizer.learning_rate": 1e-3},  # two at once
        {"mesh.fsdp": 2},  # of no matter
        {"train.stall_seconds": 60},
        {"seed": 3},
    ],
)
def test_no_series_where_no_number_is_varied_alone(
    tmp_path: pathlib.Path, data: Any, changes: Mapping[str, Any]
) -> None:
    folder = _sweep(tmp_path / "runs", {"a": {}, "b": changes})
    assert find_series(pool(read_runs([folder]))) == []
    assert "what was varied" not in _run(tmp_path, folder)[1]


def test_only_the_same_step_is_compared(tmp_path: pathlib.Path, data: Any) -> None:
    folder = _sweep(tmp_path / "runs", FOUR)
    for seed in (0, 1):
        (tmp_path / "runs" / f"offset_strength=0.2,seed={seed}" / "samples" / "step_100.json").unlink()
    assert find_series(pool(read_runs([folder]))) == []


def test_a_folder_of_runs_is_read_in_the_order_of_its_numbers(tmp_path: pathlib.Path, data: Any) -> None:
    names = ("rate=1e-05", "rate=0.0005", "rate=0.05", "rate=0.1", "rate=9", "rate=10")
    _sweep(tmp_path / "runs", {name: {} for name in reversed(names)}, samples={})
    (tmp_path / "runs" / "rate=11").mkdir()  # not begun
    (tmp_path / "runs" / "log.txt").touch()
    runs = read_runs([str(tmp_path / "runs"), _workdir(tmp_path / "other", 0.0, {})])
    assert [run.name for run in runs] == [*names, "other"]
    for folder in ("runs/rate=11", "nowhere"):
        with pytest.raises(UserError, match=re.escape(f"{folder}/config.json is missing")):
            read_runs([str(tmp_path / folder)])
    with pytest.raises(UserError, match="given twice"):
        read_runs([str(tmp_path / "runs"), str(tmp_path / "runs" / "rate=9")])


def test_runs_that_have_little_in_common_are_reported_together(tmp_path: pathlib.Path, data: Any) -> None:
    other = default_config()
    stable_diffusion_xl(other)
    sdxl = {f"model.{key}": value for key, value in other.model.items() if key != "unet"}
    sdxl = {key: value for key, value in sdxl.items() if isinstance(value, str | bool)}
    workdirs = [
        _workdir(tmp_path / "sd1", 0.1, {0: GREY, 100: WIDE}),
        _workdir(tmp_path / "sdxl", 0.1, {0: {"a night": (0.5,)}, 100: {"a night": (0.1,)}}, changes=sdxl),
        _workdir(tmp_path / "without samples", 0.0, {}),
        _workdir(tmp_path / "compiling", 0.0, {}),
    ]
    (pathlib.Path(workdirs[3]) / "metrics.jsonl").unlink()
    numbers, html = _run(tmp_path, *workdirs)
    assert [each["name"] for each in numbers["pools"]] == ["sd1", "sdxl", "without samples", "compiling"]
    assert numbers["config_differences"]["model.family"] == ["", "sdxl", "", ""]
    assert numbers["conclusions"][-1] == "compiling: nothing has been logged yet."
    assert "without samples" in html
    numbers, _ = _run(tmp_path, workdirs[3])  # alone
    assert numbers["conclusions"] == ["compiling: nothing has been logged yet."]


def test_samples_of_before_their_places_were_kept_are_shown_whole(tmp_path: pathlib.Path, data: Any) -> None:
    workdir = _workdir(tmp_path / "a", 0.1, {0: GREY, 100: WIDE})
    for path in (tmp_path / "a" / "samples").glob("*.json"):
        about = json.loads(path.read_text())
        del about["digest"]  # of before there was one
        for record in about["records"]:
            del record["box"]
        path.write_text(json.dumps(about))
    _run(tmp_path, workdir)
    assert {"after_0.png", "brightness.png"} <= {path.name for path in (tmp_path / "page_files").iterdir()}
    assert not (tmp_path / "page_files" / "headline.png").exists()
