"""The demonstration: every part of it in little, its progress; and, where there is time, what the article shows."""

import json
import logging
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from etils import epath

from offsetjax.article import demo
from offsetjax.article.pictures import BLACK_PROMPT, PROMPTS
from offsetjax.exporting.export import export
from tests.processes import call
from tests.tiny import trained_workdir

# As few pictures as there are prompts in every grid, so that drawing is compiled once.
SHORT = {"data.resolution": 16, "sample.num_steps": 2, "sample.every_steps": 2, "checkpoint.every_steps": 2}
_SEEDS = {"forty": 1, "black": 4}


def _short(each: demo.FineTuning, pretrained: str) -> demo.FineTuning:
    """Two steps of a model that compiles in seconds, as the demonstration's own does not."""
    fields = {**SHORT, "sample.seeds_per_prompt": _SEEDS[each.data], "model.pretrained": pretrained}
    return replace(each, steps=2, overrides=(*each.overrides, *((field, str(fields[field])) for field in fields)))


def _short_demo(out: str, pretrained: str) -> list[list[str]]:
    """The demonstration in steps enough to see that each part runs, and again without its page; what each logs."""
    fine_tunings = [_short(each, pretrained) for each in demo.FINE_TUNINGS]
    metrics, page = pathlib.Path(out, "plain", "metrics.jsonl"), pathlib.Path(out, "report.html")
    first = _logged(demo.demo, epath.Path(out), fine_tunings, range(4))
    before = metrics.read_bytes()
    page.unlink()
    second = _logged(demo.demo, epath.Path(out), fine_tunings, range(4))
    assert page.exists()
    assert metrics.read_bytes() == before, "what is finished is not trained again"
    return [first, second]


def _logged(function: Callable[..., object], *arguments: Any) -> list[str]:
    """What a function logs of the demonstration."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("offsetjax")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        function(*arguments)
    finally:
        logger.removeHandler(handler)
    return [line for line in lines if line.startswith("demo: ")]


def _numbers(out: pathlib.Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())


def _check_page(out: pathlib.Path) -> None:
    """The page stands alone, and no figure is missing."""
    html = (out / "report.html").read_text()
    assert "data:image/png;base64," in html
    assert 'src="http' not in html
    assert "nan" not in (out / "report.json").read_text().lower()
    figures = {file.stem for file in (out / "report_files").iterdir()}
    assert {"headline", "brightness", "unconditional", "losses", "after_3"} <= figures


def _check_steps(runs: Mapping[str, Any]) -> None:
    assert list(runs) == [each.name for each in demo.FINE_TUNINGS]
    for run in runs.values():
        assert run["steps"] == run["steps_configured"]
        assert math.isfinite(run["last_loss"])
        assert run["steps_skipped"] == 0


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory to start from."""
    out = tmp_path_factory.mktemp("pretrained") / "model"
    export(trained_workdir(tmp_path_factory.getbasetemp()), out)
    return str(out)


def test_every_part_runs_and_is_resumed(tmp_path: pathlib.Path, pretrained: str) -> None:
    out = tmp_path / "the demo"
    first, second = call(_short_demo, str(out), pretrained)
    numbers = _numbers(out)
    runs = {run["name"]: run for run in numbers["runs"]}
    _check_page(out)
    _check_steps(runs)
    assert [runs[name]["data"]["pictures"] for name in runs] == [40, 40, 1, 1]
    assert [runs[name]["noise"] for name in runs] == ["plain noise", "offset_strength 0.1"] * 2
    assert list(runs["plain"]["after"]["prompts"]) == list(PROMPTS)
    assert list(runs["black_offset"]["after"]["prompts"]) == [BLACK_PROMPT]
    assert {start: each["count"] for start, each in runs["offset"]["unconditional"].items()} == {
        "plain": 4,
        "matched": 4,
    }
    assert numbers["article"]["steps"] == 1000 and "The article" in (out / "report.html").read_text()
    stages = [
        f"demo: {number} of 7, {name}"
        for number, name in enumerate(
            [
                *runs,
                "pictures for no prompt, plain start",
                "pictures for no prompt, matched start",
                "the report",
            ],
            1,
        )
    ]
    for lines in (first, second):
        assert [line.split(";")[0] for line in lines[:-1]] == stages
        assert lines[-1].startswith(f"demo: {out / 'report.html'} after ")


def _progress(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    folder: pathlib.Path,
    stages: Sequence[tuple[float, float, bool]],
) -> list[str]:
    """What is logged by stages of (cost, seconds, whether its result is there)."""
    now = 0.0

    def take(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr("time.monotonic", lambda: now)
    listed = []
    for number, (cost, seconds, is_there) in enumerate(stages):
        result = epath.Path(folder / str(number))
        if is_there:
            result.touch()
        listed.append(demo.Stage("a stage", cost, result, lambda seconds=seconds: take(seconds)))
    caplog.clear()
    with caplog.at_level(logging.INFO, "offsetjax"):
        demo.run_stages(listed)
    return [record.getMessage().partition("a stage")[2] for record in caplog.records]


def test_the_time_left_counts_all_that_is_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: pathlib.Path
) -> None:
    lines = _progress(monkeypatch, caplog, tmp_path, [(30, 60, False), (10, 20, False), (10, 20, False)])
    assert lines == ["", "; 60% done, about 0:40 left", "; 80% done, about 0:20 left"]


def test_what_was_done_before_is_not_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: pathlib.Path
) -> None:
    lines = _progress(monkeypatch, caplog, tmp_path, [(30, 2, True), (10, 20, False), (10, 20, False)])
    assert lines == ["", "", "; 50% done, about 0:22 left"]


# The whole demonstration, run as a user runs it: ten minutes on two free cores.


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("the demo")
    # In a process of its own, which sees the machine as a user's does and not the virtual devices of the tests.
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    subprocess.run([sys.executable, "-m", "offsetjax", "demo", f"--out={out}"], check=True, env=environment)
    return out


@pytest.fixture(scope="module")
def runs(out: pathlib.Path) -> dict[str, Any]:
    return {run["name"]: run for run in _numbers(out)["runs"]}


def _means(samples: Mapping[str, Any]) -> list[float]:
    return [samples["prompts"][prompt]["mean"] for prompt in PROMPTS]


@pytest.mark.slow
@pytest.mark.timeout(3600)
class TestWhole:
    def test_the_page_and_the_steps(self, out: pathlib.Path, runs: dict[str, Any]) -> None:
        _check_page(out)
        _check_steps(runs)

    def test_the_base_model_draws_every_prompt_grey(self, runs: dict[str, Any]) -> None:
        for mean in _means(runs["plain"]["before"]):
            assert 0.35 <= mean <= 0.65

    def test_the_control_stays_grey(self, runs: dict[str, Any]) -> None:
        means = _means(runs["plain"]["after"])
        assert max(means) - min(means) <= 0.2

    def test_offset_noise_takes_the_prompts_from_black_to_white(self, runs: dict[str, Any]) -> None:
        means = _means(runs["offset"]["after"])
        assert means[-1] - means[0] >= 0.5
        assert means == sorted(means)  # PROMPTS go from dark to bright

    def test_both_learn_one_black_picture_and_offset_noise_faster(self, runs: dict[str, Any]) -> None:
        plain, offset = (
            [samples["prompts"][BLACK_PROMPT]["mean"] for samples in runs[name]["samples"]]
            for name in ("black_plain", "black_offset")
        )
        assert plain[0] == offset[0] > 0.35
        assert offset[-1] < 0.1
        assert plain[-1] < 0.1  # the article's plain control did not; at this scale it does
        assert sum(offset) < sum(plain)

    def test_the_matched_start_and_not_the_training_restores_the_spread(self, runs: dict[str, Any]) -> None:
        drawn = runs["offset"]["unconditional"]
        assert drawn["matched"]["std"] > 2 * drawn["plain"]["std"]
