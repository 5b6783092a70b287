"""What SDXL's denoiser is told in training: the captions, or zeros, and the sizes of the pictures."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from offsetjax.cli import main
from offsetjax.config import default_config
from offsetjax.data.source import open_source
from offsetjax.models.encode import encode_captions
from offsetjax.models.pipeline import join
from offsetjax.models.task import task_of
from offsetjax.models.weights import abstract_trained, initial_trained
from offsetjax.parallel import sharding
from offsetjax.training.objective import add_position
from offsetjax.training.setup import Run, open_run
from offsetjax.training.streams import open_stream
from tests import families, tiny

COUNT = len(families.SIZES)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("sdxl conditions")
    families.build_data(folder)
    families.save_tiny_xl(folder / "model")
    return folder


@pytest.fixture(scope="module")
def begun(base: pathlib.Path) -> tuple[Run, dict[str, Any], dict[str, Any]]:
    """A small model's run, the denoiser before the first step, and the first batch: pictures of eight sizes."""
    config = default_config()
    config.data.path, config.data.resolution = str(base / "data"), tiny.RESOLUTION
    config.train.global_batch_size, config.encode.caption_dropout = COUNT, 0.0
    config.model.pretrained, config.model.dtype = str(base / "model"), "float32"
    source = open_source(config.data.path)
    run = open_run(config, epath.Path(base / "run"), source)
    batches = open_stream(run.config, run.pipeline, source).iterator(0)
    batch = add_position(next(batches), COUNT)
    batches.close()
    place = sharding.shardings(run.mesh, run.pipeline.sharding, abstract_trained(run.pipeline, run.config.lora))
    return run, initial_trained(run.pipeline, run.config.model, run.config.lora, run.config.seed, place), batch


def test_the_sizes_are_those_of_the_pictures_and_each_of_them_counts(
    begun: tuple[Run, dict[str, Any], dict[str, Any]],
) -> None:
    run, trained, batch = begun
    assert {tuple(each) for each in batch["time_ids"][:, :2]} == set(families.SIZES)
    # Resized until the shorter side is 16, then cropped at the centre.
    for height, width, top, left, *target in batch["time_ids"]:
        scale = 16 / min(height, width)
        assert (top, left) == pytest.approx(((height * scale - 16) // 2, (width * scale - 16) // 2), abs=1)
        assert target == [16, 16]
    objective = jax.jit(task_of(run.config).objective(run.pipeline, run.config))
    plain = np.asarray(objective(trained, run.frozen, batch, 0))
    for number in range(6):
        changed = batch["time_ids"].copy()
        changed[2, number] += 100
        other = np.asarray(objective(trained, run.frozen, {**batch, "time_ids": changed}, 0))
        differs = np.abs(other - plain) > 1e-4 * plain
        assert differs.tolist() == [place == 2 for place in range(COUNT)], number


def test_an_empty_caption_is_zeros_where_the_model_was_trained_so(
    begun: tuple[Run, dict[str, Any], dict[str, Any]],
) -> None:
    run, trained, batch = begun
    assert run.pipeline.settings["force_zeros_for_empty_prompt"]
    empty_ids = run.pipeline.tokens("").input_ids
    is_third = np.arange(COUNT)[:, None] == 3
    ids = {part: np.where(is_third, empty_ids[part], each) for part, each in batch["input_ids"].items()}

    def told(ids: Any, is_zeroed: bool) -> list[np.ndarray]:
        settings = {**run.pipeline.settings, "force_zeros_for_empty_prompt": is_zeroed}
        pipeline, params = dataclasses.replace(run.pipeline, settings=settings), join(trained, run.frozen)
        told = encode_captions(pipeline, params, ids, batch["time_ids"], empty_ids)
        added = told["added_conditions"]
        return [np.asarray(each) for each in (told["encoder_hidden_states"], added["text_embeds"], added["time_ids"])]

    plain, zeroed, unzeroed = told(batch["input_ids"], True), told(ids, True), told(ids, False)
    np.testing.assert_array_equal(zeroed[2], batch["time_ids"])  # the sizes are told all the same
    others = np.arange(COUNT) != 3
    for texts, with_zeros, without in list(zip(plain, zeroed, unzeroed, strict=True))[:2]:
        assert not with_zeros[3].any()
        assert without[3].any()
        for found in (with_zeros, without):
            np.testing.assert_allclose(found[others], texts[others], rtol=1e-5, atol=1e-6)
        assert np.abs(texts).reshape(COUNT, -1).max(1).all()


def test_a_caption_that_is_too_long_is_refused_by_its_record(
    base: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.py").write_text("from offsetjax.config import default_config as get_config\n")
    fields = {
        "data.path": base / "data",
        "data.resolution": tiny.RESOLUTION,
        "model.pretrained": base / "model",
        "encode.long_captions": "refuse",
    }
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    assert main(["train", f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}", *overrides]) == 2
    lines = capsys.readouterr().err.splitlines()
    [message] = [line for line in lines if line.startswith("offsetjax: error:")]
    assert lines[-1] == message
    assert "the caption of record 1 (1.png) of" in message
    assert "but the text encoders read 12; shorten it, or set encode.long_captions='truncate'" in message
