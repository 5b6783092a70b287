"""A task that offsetjax does not know trains, evaluates and says what it can be exported as, through the registry."""

import json
import pathlib

import jax
import numpy as np
import pytest

from offsetjax.cli import main
from offsetjax.config.registries import TASKS
from offsetjax.models.task import Task
from offsetjax.models.trained import load_trained
from offsetjax.train import train
from offsetjax.training.evaluators import Evaluation, Evaluator
from offsetjax.training.objective import diffusion_objective
from tests import tiny

WORDS = Task(
    name="words",
    title="the text encoders for a denoiser that stays",
    parts=lambda family: family.parts,
    trained=lambda family, learns_text: family.encoders,
    denoises=True,
    objective=lambda pipeline, config: diffusion_objective(
        pipeline, config.seed, config.encode.caption_dropout, config.loss
    ),
    evaluators=lambda run, source: [Evaluator(2, lambda state, step: Evaluation({"pictures": float(len(source))}))],
    advice=lambda pipeline, config: ("words alone are learnt",),
    formats=("diffusers",),
    rules=lambda values: iter([(values["sample.every_steps"], "sample.every_steps cannot apply to words")]),
)


def test_it_trains_its_own_parts_with_its_own_evaluator(
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    TASKS.register("words", WORDS)
    base, run = tmp_path_factory.getbasetemp(), tmp_path / "run"
    config = tiny.tiny_config(tiny.data_path(base), task="words", train__steps=2, mesh__data=-1)
    with tiny.quick_compilation(base):
        train(config, run)
    assert "words alone are learnt" in caplog.text
    trained = load_trained(run)
    assert set(trained.params) == {"text_encoder"} and set(trained.frozen) == {"unet", "vae"}
    drawn = trained.pipeline.parts["text_encoder"].init(jax.random.key(0))
    assert jax.tree.structure(trained.params["text_encoder"]) == jax.tree.structure(drawn)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["pictures"] for line in lines if "pictures" in line] == [16, 16]  # before the first step, after both
    assert np.isfinite([line["loss"] for line in lines if "loss" in line]).all()
    assert main(["export", f"--workdir={run}", "--format=single_file", f"--out={tmp_path / 'model.safetensors'}"]) == 2
    message = capsys.readouterr().err
    assert "trained the text encoders for a denoiser that stays; use --format=diffusers" in message
    assert main(["train", f"--config={_file(tmp_path)}", f"--workdir={tmp_path / 'other'}"]) == 2
    assert "sample.every_steps cannot apply to words" in capsys.readouterr().err


def _file(folder: pathlib.Path) -> pathlib.Path:
    (folder / "config.py").write_text(
        "from tests.tiny import tiny_config\nget_config = lambda: tiny_config(task='words', sample__every_steps=5)\n"
    )
    return folder / "config.py"
