"""`offsetjax study`: what it runs, what it leaves alone, and what it makes of the runs and pictures that it has."""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from etils import epath
from PIL import Image

from offsetjax.article.pictures import PROMPTS
from offsetjax.cli import main
from offsetjax.errors import UserError
from offsetjax.study import command
from offsetjax.study.kinds import KINDS, noise_of
from offsetjax.study.variants import TRAININGS, VARIANTS
from offsetjax.training.jsonl import JsonLines
from tests import tiny


def _train(workdir: pathlib.Path) -> None:
    """A training of two steps that validates at each, before it writes the step's own line."""
    if workdir.exists():
        return
    workdir.mkdir()
    metrics = JsonLines(epath.Path(workdir), 0, 2)
    for step in (1, 2):
        metrics.scalars(step, {"validation_plain": 0.5 / step})
        metrics.scalars(step, {"loss": 1.0, "images_per_second": 1.0})
    metrics.close()


def _draw(arguments: Iterable[tuple[str, str]]) -> None:
    """Pictures that are as bright as their seed, over 47."""
    listed = list(arguments)
    seeds = [int(value) for name, value in listed if name == "--seed"]
    prompts = [value for name, value in listed if name == "--prompt"]
    folder = pathlib.Path(dict(listed)["--out"])
    folder.mkdir(parents=True)
    records = [{"prompt": prompt, "brightness": seed / 47} for prompt in prompts for seed in seeds]
    (folder / "samples.json").write_text(json.dumps({"records": records}))


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The commands that the study runs, which here leave behind what real ones do."""
    called: list[tuple[str, ...]] = []

    def run(name: str, *arguments: str, output: pathlib.Path) -> None:
        called.append((name, *arguments))
        pairs = [(argument.partition("=")[0], argument.partition("=")[2]) for argument in arguments]
        if name == "train":
            _train(pathlib.Path(dict(pairs)["--workdir"]))
        else:
            _draw(pairs)

    monkeypatch.setattr(command, "_offsetjax", run)
    return called


def test_runs_become_a_table_and_figures_once(
    tmp_path: pathlib.Path, called: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.build_data(tmp_path)
    assert main(["study", f"--out={tmp_path}", "--seeds=2", "--jobs=1"]) == 0
    trained = [dict(each.split("=", 1) for each in call[1:]) for call in called if call[0] == "train"]
    assert len(trained) == 2 * len(TRAININGS)
    assert {each["--config.seed"] for each in trained} == {"0", "1"}
    assert sum(each.get("--config.noise.offset_strength") == "0.1" for each in trained) == 4
    found: dict[str, Any] = json.loads((tmp_path / "study.json").read_text())
    assert list(found["variants"]) == list(VARIANTS)
    for runs in found["variants"].values():
        assert [run["seed"] for run in runs] == [0, 1]
        for run in runs:
            assert run["validation_plain"] == 0.25
            assert run["std"] == pytest.approx(np.std(np.arange(48) / 47))
            assert run["prompts"] == {prompt: pytest.approx(3.5 / 47) for prompt in PROMPTS}
    rows = (tmp_path / "study.md").read_text().splitlines()
    assert len(rows) == 2 + len(VARIANTS) + 1
    assert rows[2].startswith("| plain | 0.29 ± 0.00 |")
    assert "| offset, matched |" in capsys.readouterr().out
    for name in ("study", "kinds"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.width > 1000
    called.clear()
    assert main(["study", f"--out={tmp_path}", "--seeds=2"]) == 0
    assert {call[0] for call in called} == {"train"}, "train resumes by itself; what is drawn stays"


def test_a_training_that_fails_ends_the_study(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: str, output: pathlib.Path) -> None:
        raise UserError(f"see {output}")

    tiny.build_data(tmp_path)
    monkeypatch.setattr(command, "_offsetjax", fail)
    with pytest.raises(UserError, match=r"see .*plain 0\.log"):
        command.study(str(tmp_path))
    assert not (tmp_path / "study.json").exists()


@pytest.mark.parametrize("flag", ["--jobs=0", "--seeds=0"])
def test_numbers_out_of_range_are_refused(tmp_path: pathlib.Path, flag: str) -> None:
    assert main(["study", f"--out={tmp_path / 'out'}", flag]) == 2
    assert not (tmp_path / "out").exists()


def test_the_kinds_of_noise_are_those_that_their_names_say() -> None:
    kinds = {name.split()[0]: noise_of(settings) for name, settings in KINDS.items()}
    assert {name: noise.kind for name, noise in kinds.items() if name not in ("plain", "offset")} == {
        name: name for name in ("pyramid", "spectral", "adjusted")
    }
    assert kinds["plain"].is_plain and kinds["offset"].strengths.max() == pytest.approx(0.1)
