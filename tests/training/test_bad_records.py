"""A data set of which one record in twenty cannot be read, made around the builder: trained on, counted, or refused."""

import json
import pathlib
import re
import shutil
from typing import Any

import pytest
import tensorflow_datasets as tfds

from offsetjax.errors import UserError
from offsetjax.storage.checkpoint import newest_step
from offsetjax.train import train
from tests import tiny
from tests.data.test_stream import NOISE, ODD, encoded, write_split


@pytest.fixture(scope="module")
def bad_set(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """40 pictures: two cannot be shown; two are CMYK and of 16 bits, which can."""
    names = ("corrupt", "empty", "CMYK", "16 bits")
    pictures = [*(ODD[name] for name in names), *[encoded(NOISE // 40 * each, "PNG") for each in range(36)]]
    features = {"image": tfds.features.Image(), "caption": tfds.features.Text()}
    folder = tmp_path_factory.mktemp("bad") / "set"
    write_split(folder, features, [{"image": data, "caption": str(each)} for each, data in enumerate(pictures)])
    return folder


def run(bad_set: pathlib.Path, workdir: pathlib.Path, max_bad_fraction: float) -> list[list[Any]]:
    config = tiny.run_config(bad_set, sample__every_steps=0, data__max_bad_fraction=max_bad_fraction)
    train(config, workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [[line[name] for name in ("step", "loss", "grad_norm", "records_replaced")] for line in lines]


@pytest.mark.chaos
def test_a_run_leaves_bad_records_out_and_counts_them_alike_after_a_resume(
    bad_set: pathlib.Path,
    tmp_path: pathlib.Path,
    tmp_path_factory: pytest.TempPathFactory,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with tiny.quick_compilation(tmp_path_factory.getbasetemp()):
        whole = run(bad_set, tmp_path / "run", 0.05)
        told = [record.getMessage() for record in caplog.records if "is no picture" in record.getMessage()]
        assert len(told) == 2 and all(re.search(r"record \d+ .*; another takes its place$", line) for line in told)
        counts = [line[-1] for line in whole]
        assert len(counts) == 6 and counts == sorted(counts) and counts[4] == 2, "an epoch is of five steps"
        for step in (4, 6):
            shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
        assert run(bad_set, tmp_path / "run", 0.05) == whole
        with pytest.raises(UserError, match=r"records of .* could not be read in \d+ examples, more than data\.max_ba"):
            run(bad_set, tmp_path / "few", 0.01)
        assert newest_step(tmp_path / "few") > 0, "what was trained is saved first"
        assert run(bad_set, tmp_path / "few", 0.05) == whole, "and is resumed with another limit"
