"""`train --check`, and what a run says at its start: all is looked at, nothing is written, all mistakes are found."""

import json
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from offsetjax.cli import main
from offsetjax.config import to_json
from offsetjax.data.buckets import Size
from offsetjax.data.record import Latents
from offsetjax.data.source import open_source
from offsetjax.parallel import fallback
from offsetjax.training import check as checking
from offsetjax.training.check import check
from tests import tiny
from tests.data.test_brightness import Pictures


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny.build_data(tmp_path_factory.mktemp("check"))


def test_it_says_what_would_happen_and_writes_nothing(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = tiny.tiny_config(data, sample__every_steps=2, sample__prompts=("a cat",), train__steps=6)
    wrong, _, lines = check(config, tmp_path / "run")
    assert wrong == [] and not list(tmp_path.iterdir())
    text = "\n".join(lines)
    for words in (
        "data: 16 pictures of ",
        "steps: 6 of 8 examples, 3 epochs",
        "noise: offset, strength 0.1 for 8x8 latents",
        "trained: ",
        "(unet ",
        "frozen: ",
        "devices: 8 cpu; mesh data 8, fsdp 1, tensor 1",
        f"checkpoints: {tmp_path}/run/checkpoints, every 2 steps",
        f"pictures: {tmp_path}/run/samples, 1 every 2 steps",
    ):
        assert words in text, text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__path": "/no/such/data"}, "/no/such/data"),
        ({"data__split": "train[:"}, "train[:"),
        ({"mesh__data": 3}, "does not fit 8 devices"),
        ({"train__global_batch_size": 9}, "must be a multiple of the 8 devices"),
        ({"data__resolution": 15}, "data.resolution = 15 must be a multiple"),
        ({"data__buckets": ("16x16", "16x15")}, "data.buckets: 16x15 must be multiples of"),
        ({"data__buckets": ("16x16", "8x128")}, "goes to 8x128 of data.buckets"),
        (
            {"data__buckets": ("16x16",), "data__equal_tokens": 3},
            "data.equal_tokens = 3 must be a multiple of",
        ),
        ({"model__pretrained": "/no/such/model"}, "/no/such/model"),
        ({"model__unet__cross_attention_dim": 24}, "cross_attention_dim = 24 must be 16"),
        ({"model__attention": "splash"}, "model.attention = splash"),
        ({"validation__every_steps": 1, "validation__split": "train[50%:]"}, "validation"),
    ],
)
def test_it_finds_what_would_stop_a_training(
    data: pathlib.Path, tmp_path: pathlib.Path, changes: dict[str, Any], words: str
) -> None:
    wrong, _, lines = check(tiny.tiny_config(**{"data_path": data, **changes}), tmp_path / "run")
    assert any(words in each for each in wrong) and not lines, wrong
    assert all("\n" not in each for each in wrong) and not list(tmp_path.iterdir())


def test_it_finds_several_at_once(tmp_path: pathlib.Path, data: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    config = tiny.tiny_config(data, mesh__data=3, data__resolution=15)
    wrong, _, _ = check(config, tmp_path / "file" / "run")
    assert len(wrong) == 3, wrong


@pytest.mark.parametrize(
    ("greys", "max_bad_fraction", "stops"),
    [((1, None, 3), 0.0, True), ((1, None, 3), 0.01, False), ((None,), 0.01, True)],
)
def test_a_record_that_a_training_leaves_out_stops_nothing(
    greys: tuple[int | None, ...], max_bad_fraction: float, stops: bool
) -> None:
    found = checking._Found()
    checking._look_at_records(found, Pictures(*greys), 4, max_bad_fraction)
    assert (len(found.wrong), len(found.notes)) == ((1, 0) if stops else (0, 1))
    assert "made here is no picture" in (found.wrong + found.notes)[0]


def test_it_says_which_sizes_there_are_and_how_long_an_epoch_is(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = tiny.tiny_config(data, data__buckets=("16x16",), train__steps=6)
    wrong, _, lines = check(config, tmp_path / "run")
    count = len(open_source(data))
    assert not wrong and any(f"16x16: {count} pictures, 0.0% cropped" in line for line in lines)
    assert any(f"steps: 6 of 8 examples, {6 * 8 / count:.3g} epochs" in line for line in lines)


@pytest.mark.parametrize("size", [Size(16, 16), Size(8, 24), Size(0, 0)])
def test_latents_of_several_sizes_are_looked_at(size: Size) -> None:
    time_ids = np.array([16, 16, 0, 0, size.height, size.width], np.float32)
    found = checking._Found()
    source = [Latents(np.zeros((1, 2, 4, 8, 8), np.float16), time_ids, 0.5, "a", "b", size)]
    checking._look_at_records(found, source, 16, 0.0)  # type: ignore[arg-type]
    assert not found.wrong and not found.notes


def test_it_says_that_the_disk_is_too_small(
    data: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "free_bytes", lambda folder: 1000)
    wrong, _, _ = check(tiny.tiny_config(data), tmp_path / "run")
    assert len(wrong) == 1 and "has room for 0.00 GiB" in wrong[0] and "lower checkpoint.max_to_keep" in wrong[0]


def test_it_notes_prompts_that_are_cut(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = tiny.tiny_config(data, sample__every_steps=2, sample__prompts=("a cat", "a boat " * 20))
    _, notes, lines = check(config, tmp_path / "run")
    [cut] = [note for note in notes if "sample.prompts: 'a boat" in note]
    assert "reads 8 of them" in cut and lines


def _file(folder: pathlib.Path, config: Any) -> str:
    (folder / "config.json").write_text(to_json(config))
    (folder / "c.py").write_text(
        "import pathlib\nfrom offsetjax.config import from_json\n\ndef get_config():\n"
        "    return from_json(pathlib.Path(__file__).with_name('config.json').read_text())\n"
    )
    return str(folder / "c.py")


def test_the_command_and_the_start_of_a_run_say_the_same(
    data: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    file, run = _file(tmp_path, tiny.tiny_config(data, train__steps=1)), tmp_path / "run"
    arguments = ["train", f"--config={file}", f"--workdir={run}", "--config.noise.offset_strength=0.2"]
    assert main([*arguments, "--check"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == "nothing is wrong; nothing was written" and len(lines) == 8 and not run.exists()
    assert main([*arguments, "--check", "--config.data.path=/no/such"]) == 2
    with caplog.at_level(logging.INFO, "offsetjax"), tiny.quick_compilation(tmp_path):
        assert main(arguments) == 0
    assert {line.removeprefix("note: ") for line in lines} <= {record.getMessage() for record in caplog.records}
    (start,) = map(json.loads, (run / "starts.jsonl").read_text().splitlines())
    assert start["versions"].keys() >= {"offsetjax", "jax", "flax", "optax", "python"}
    assert start["config_text"] == pathlib.Path(file).read_text()
    assert start["overrides"] == {"noise.offset_strength": "0.2"} and start["step"] == 0
    assert main([*arguments, "--check"]) == 0  # of a run that is there


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda root: (root / "dev/nvidia0").write_text(""), "nvidia0"),
        (lambda root: (root / "dev/accel0").write_text(""), "accel0"),
        (lambda root: (root / "sys/bus/pci/devices/0000:00:05.0/vendor").write_text("0x1ae0\n"), "0000:00:05.0"),
        (lambda root: (root / "sys/bus/pci/devices/0000:00:05.0/vendor").write_text("0x8086\n"), ""),
    ],
)
def test_a_fall_back_to_the_cpu_is_said_in_capitals(
    make: Callable[[pathlib.Path], Any],
    expected: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "sys/bus/pci/devices/0000:00:05.0").mkdir(parents=True)
    make(tmp_path)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert fallback.warn_of_cpu(str(tmp_path)) == bool(expected)
    assert ("COMPUTING ON THE CPU" in caplog.text) == bool(expected) and expected in caplog.text
    caplog.clear()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not fallback.warn_of_cpu(str(tmp_path)) and not caplog.text


def test_jax_is_not_silenced() -> None:
    assert logging.getLogger("jax._src.xla_bridge").getEffectiveLevel() <= logging.WARNING
