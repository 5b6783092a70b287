"""The command: help at once, and a user's mistake is one line and exit status 2."""

import json
import os
import pathlib
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from PIL import Image

from offsetjax.cli import main
from offsetjax.commands.explain import explain
from tests.tiny import CAPTIONS, data_path, quick_compilation, trained_workdir

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = str(ROOT / "configs" / "article" / "base.py")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def workdir(base: pathlib.Path) -> Iterator[pathlib.Path]:
    with quick_compilation(base):
        yield trained_workdir(base)


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("offsetjax: error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("--config.nose.offset_strength=1",),
            "unknown key 'nose.offset_strength'; did you mean noise.offset_strength",
        ),
        (("--config.noise_offset=0.1",), "it is called noise.offset_strength here"),
        (("--config.cache_latents=True",), "it is called data.cached_latents here"),
        (("--config.train.steps=many",), "train.steps = 'many' is not of type int"),
        (("--config.train.steps=0",), "train.steps = 0 must be at least 1"),
        (("--noise_offset=0.1",), "unknown argument --noise_offset=0.1; fields are given as --config.path=value"),
        (("--config.noise.offset_strength", "0.1"), "unknown argument --config.noise.offset_strength;"),
    ],
)
def test_a_mistake_in_what_to_train_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, arguments: tuple[str, ...], words: str
) -> None:
    workdir = tmp_path / "run"
    assert words in _refused(capsys, "train", f"--config={CONFIG}", f"--workdir={workdir}", *arguments)
    assert not workdir.exists()


def test_a_missing_config_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    error = _refused(capsys, "train", f"--config={tmp_path}/none.py", f"--workdir={tmp_path}/run")
    assert "none.py is not a local file" in error


def test_missing_data_is_one_line_after_the_configs_digest(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    arguments = ("train", f"--config={CONFIG}", f"--workdir={tmp_path}/run", f"--config.data.path={tmp_path}/none")
    assert main(arguments) == 2
    assert "none' holds no data set" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("command", [("sample", "--prompt=a"), ("export",)])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--workdir={empty}",), "has no config.json; give the --workdir of a training"),
        (("--workdir={run}", "--step=5"), "has no step 5 (it has 2, 4, 6); give --step one of these"),
        (("--workdir={raw}", "--params=ema"), "no average was kept (optimizer.ema_decay = 0); use --params=raw"),
        (("--workdir={run}", "--stop=5"), "unknown argument --stop=5; see --help"),
    ],
)
def test_a_mistake_in_what_to_read_is_one_line(
    capsys: pytest.CaptureFixture[str],
    workdir: pathlib.Path,
    tmp_path: pathlib.Path,
    command: tuple[str, ...],
    arguments: tuple[str, ...],
    words: str,
) -> None:
    places = {name: tmp_path / f"{name} dir" for name in ("empty", "raw", "out")} | {"run": workdir}
    places["raw"].mkdir()
    config = json.loads((workdir / "config.json").read_text())
    config["optimizer"]["ema_decay"] = 0.0
    del config["digest"]
    (places["raw"] / "config.json").write_text(json.dumps(config))
    given = [argument.format(**places) for argument in (*command, *arguments, "--out={out}")]
    assert words in _refused(capsys, *given)
    assert not places["out"].exists()


def test_a_folder_that_is_there_is_not_written_over(
    capsys: pytest.CaptureFixture[str], workdir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    assert "exists; give another --out" in _refused(capsys, "export", f"--workdir={workdir}", f"--out={tmp_path}")


def test_pictures_are_drawn_from_the_command_line(workdir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "two pictures"
    arguments = [f"--workdir={workdir}", f"--out={out}", "--num_steps=2", "--seed=3", "--seed=8", "--params=raw"]
    assert main(["sample", *arguments, f"--prompt={CAPTIONS[0]}", f"--prompt={CAPTIONS[1]}"]) == 0
    about = json.loads((out / "samples.json").read_text())
    assert (about["params"], about["num_steps"], len(about["records"])) == ("raw", 2, 4)
    with Image.open(out / "samples_002_seed_3.png") as image:
        assert image.size == (16, 16)


def test_a_finished_training_is_left_alone(
    workdir: pathlib.Path, base: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(workdir, tmp_path / "run")
    file = tmp_path / "tiny config.py"
    file.write_text(
        "from tests.tiny import run_config\n\n\ndef get_config():\n"
        f"    return run_config({str(data_path(base))!r}, sample__num_steps=3)\n"
    )
    arguments = ["train", f"--config={file}", f"--workdir={tmp_path}/run", "--config.sample.num_steps=2"]
    assert main(arguments) == 0
    assert "raise train.steps to continue" in caplog.text


def test_a_data_set_is_inspected(base: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", f"--data={data_path(base)}"]) == 0
    assert "train: 16 pictures" in capsys.readouterr().out
    assert main(["data", "inspect", f"--data={data_path(base)}", "--split=train[:4]"]) == 0
    assert "train[:4]: 4 pictures" in capsys.readouterr().out
    words = "has no split 'test'; it has train"
    assert words in _refused(capsys, "data", "inspect", f"--data={data_path(base)}", "--split=test")


@pytest.mark.parametrize(
    "command",
    [
        (),
        ("train",),
        ("sweep",),
        ("sample",),
        ("calibrate",),
        ("export",),
        ("data",),
        ("data", "build"),
        ("data", "encode"),
        ("data", "inspect"),
        ("report",),
        ("demo",),
    ],
)
def test_each_command_has_help(capsys: pytest.CaptureFixture[str], command: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    assert "usage: " + " ".join(("offsetjax", *command)) in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [(), ("trian",), ("train",), ("sample", "--workdir=x"), ("export", "--step=one")])
def test_an_incomplete_command_exits_with_2(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("usage: ")


def test_help_comes_at_once() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-X", "importtime", "-m", "offsetjax", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "usage: offsetjax" in done.stdout
    # Processor time, which does not depend on what else the machine does.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert not imported & {"diffusers", "transformers", "orbax", "tensorflow_datasets", "grain", "matplotlib"}


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (
            FileNotFoundError(2, "No such file or directory", "a.py"),
            2,
            "a.py: No such file or directory; see to it and try again",
        ),
        (FileNotFoundError("Bucket does not exist: b"), 2, "Bucket does not exist: b; see to it and try again"),
        (
            OSError("Cannot connect to\nhost storage.googleapis.com"),
            75,
            "Cannot connect to host storage.googleapis.com; it may pass by itself: the same command tries again",
        ),
        (
            socket.gaierror(-2, "Name or service not known"),
            75,
            "[Errno -2] Name or service not known; it may pass by itself: the same command tries again",
        ),
        (
            OSError(5, "Input/output error", "a"),
            75,
            "a: Input/output error; it may pass by itself: the same command tries again",
        ),
        (
            OSError(28, "No space left on device", "a"),
            74,
            "a: No space left on device (FREE are free); see to it, then the same command tries again",
        ),
    ],
)
def test_what_a_disk_or_a_network_refuses_is_one_line(
    capsys: pytest.CaptureFixture[str], error: OSError, status: int, text: str
) -> None:
    assert explain(error) == status
    said = re.sub(r"[\d.]+ [kMG]?B(ytes)? are free", "FREE are free", capsys.readouterr().err)
    assert said == f"offsetjax: error: {text}\n"


def test_a_connection_that_a_part_of_the_program_broke_keeps_its_stack_trace(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert explain(ConnectionResetError(104, "Connection reset by peer")) == 75
    assert "ConnectionResetError: [Errno 104]" in capsys.readouterr().err.splitlines()[0]
