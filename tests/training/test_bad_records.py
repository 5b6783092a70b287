"""A data set of which one record in twenty cannot be read, made around the builder: trained on, counted, or refused."""

import json
import pathlib
import re
from typing import Any

import pytest
import tensorflow_datasets as tfds

from offsetjax.errors import UserError
from offsetjax.train import train
from tests import tiny
from tests.data.test_stream import BAD, NOISE, ODD, encoded, write_split


@pytest.fixture(scope="module")
def bad_set(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """100 pictures: five cannot be shown; two are CMYK and of 16 bits, which can."""
    pictures = [*ODD.values(), *[encoded(NOISE // 100 * each, "PNG") for each in range(100 - len(ODD))]]
    features = {"image": tfds.features.Image(), "caption": tfds.features.Text()}
    folder = tmp_path_factory.mktemp("bad") / "set"
    write_split(folder, features, [{"image": data, "caption": str(each)} for each, data in enumerate(pictures)])
    return folder


def run(bad_set: pathlib.Path, workdir: pathlib.Path, **changes: Any) -> list[dict[str, Any]]:
    config = tiny.run_config(bad_set, **{"sample__every_steps": 0, "data__max_bad_fraction": 0.05, **changes})
    train(config, workdir)
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_bad_records_out_and_counts_them_alike_after_a_resume(
    bad_set: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tiny.quick_compilation(tmp_path):
        whole = run(bad_set, tmp_path / "whole", train__steps=13)
        told = {re.sub(r"^data: (record \d+) .*", r"\1", record.getMessage()) for record in caplog.records}
        assert len([each for each in told if re.fullmatch(r"record \d+", each)]) == len(BAD)
        run(bad_set, tmp_path / "resumed", train__steps=6)
        resumed = run(bad_set, tmp_path / "resumed", train__steps=13)
        with pytest.raises(
            UserError, match=r"records of .* could not be read in \d+ examples, more than data\.max_bad"
        ):
            run(bad_set, tmp_path / "few", train__steps=13, data__max_bad_fraction=0.01)
    counts = [line["records_replaced"] for line in whole]
    assert counts == sorted(counts) and counts[-1] >= len(BAD), "each is met in the first epoch, of 12.5 steps"
    fields = ("step", "loss", "grad_norm", "records_replaced")
    assert [[line[name] for name in fields] for line in resumed] == [[line[name] for name in fields] for line in whole]
