"""launch/noise_study.py: what it makes of the runs and pictures that it has."""

import json
from pathlib import Path
from types import ModuleType

import pytest

from offsetjax.article.pictures import PROMPTS
from offsetjax.training.metrics import MetricsWriter
from tests import tiny
from tests.scripts import load_script


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return load_script("noise_study")


def write_metrics(workdir: Path) -> None:
    """As a training of two steps does that looks at each: what it saw at a step before the step's own line."""
    workdir.mkdir()
    metrics = MetricsWriter(workdir, 0, 2)
    for step in (1, 2):
        metrics.write_evaluation(step, {"validation_plain": 0.5 / step})
        metrics.write(step, {"loss": 1.0, "images_per_second": 1.0})
    metrics.close()


def test_finished_runs_become_a_table_and_a_figure(study: ModuleType, tmp_path: Path) -> None:
    tiny.build_data(tmp_path)
    for name in study.TRAININGS:
        write_metrics(tmp_path / f"{name} 0")
    records = [{"prompt": prompt, "brightness": 0.5} for prompt in PROMPTS]
    for name, start in study.ARMS.values():
        for has_prompts in (False, True):
            folder = study.drawn(tmp_path, name, 0, start, has_prompts)
            folder.mkdir(parents=True)
            (folder / "samples.json").write_text(json.dumps({"records": records}))
    collected = study.collect(tmp_path, range(1))
    assert {run["validation_plain"] for [run] in collected["arms"].values()} == {0.25}
    assert len(study.table(collected).splitlines()) == 2 + len(study.ARMS) + 1
    study.figure(collected).savefig(tmp_path / "study.png")
