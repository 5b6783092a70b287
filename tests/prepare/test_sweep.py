"""A sweep's points are those of its grid, each under its own name; what is wrong with any is told before the first."""

import pathlib
import re
import shlex
from typing import Any

import pytest

from offsetjax.cli import main
from offsetjax.config import flatten, to_json
from offsetjax.errors import UserError
from offsetjax.models.resolve import resolve
from offsetjax.prepare.sweep import load_points, state
from offsetjax.storage.checkpoint import newest_step
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted(file.relative_to(ROOT) for file in (ROOT / "configs" / "sweeps").glob("*.py"))

FILE = """
from offsetjax.config import default_config

def get_config():
    config = default_config()
    config.optimizer.warmup_steps = 7
    return config

def get_grid():
    return {grid}
"""


def sweep_file(folder: pathlib.Path, grid: Any) -> str:
    file = folder / "sweep.py"
    file.write_text(FILE.replace("{grid}", grid if isinstance(grid, str) else repr(grid)))
    return str(file)


def test_the_points_are_all_combinations_of_the_grid(tmp_path: pathlib.Path) -> None:
    points = load_points(sweep_file(tmp_path, {"noise.offset_strength": (0, 0.1), "seed": range(3)}))
    assert [point.name for point in points] == [
        f"offset_strength={strength},seed={seed}" for strength in ("0.0", "0.1") for seed in (0, 1, 2)
    ]
    for point, strength, seed in zip(points, (0, 0, 0, 0.1, 0.1, 0.1), (0, 1, 2) * 2, strict=True):
        config = dict(flatten(point.config))
        assert (config["noise.offset_strength"], config["seed"], config["optimizer.warmup_steps"]) == (
            strength,
            seed,
            7,
        )


def test_a_list_of_grids_has_the_points_of_each(tmp_path: pathlib.Path) -> None:
    grids = [
        {"noise.offset_strength": [0.1], "noise.random_strength": [False, True]},
        {"noise.input_perturbation": [0.2]},
    ]
    names = [point.name for point in load_points(sweep_file(tmp_path, grids))]
    assert names == [
        "offset_strength=0.1,random_strength=False",
        "offset_strength=0.1,random_strength=True",
        "input_perturbation=0.2",
    ]


def test_a_name_says_which_of_two_fields_and_is_safe_anywhere(tmp_path: pathlib.Path) -> None:
    grid = {
        "train.steps": [10],
        "sample.num_steps": [4],
        "sample.every_steps": [5],
        "checkpoint.every_steps": [3],
        "sample.brightness": [(-0.5, 0.5)],
        "sample.negative_prompt": ["a/b: *?", "a\\b [x]", "x" * 300, "x" * 301, "ünï"],
    }
    points = load_points(sweep_file(tmp_path, grid))
    assert points[0].name.startswith(
        "steps=10,num_steps=4,sample.every_steps=5,checkpoint.every_steps=3,brightness=-0.5-0.5,neg"
    )
    assert len({point.name for point in points}) == 5
    for point in points:
        assert re.fullmatch(r"[A-Za-z0-9._=,+-]{1,100}", point.name)
        (tmp_path / point.name).mkdir()
    assert load_points(sweep_file(tmp_path, grid))[3].name == points[3].name


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({}, "get_grid() must return fields and their values"),
        ([], "get_grid() has no grid"),
        ("None", "got None"),
        ("seed", "NameError: name 'seed' is not defined"),
        ({"seed": []}, "seed has no values; give at least one"),
        ({"seed": 1}, "seed = 1 is not a list of values, such as (1,)"),
        ({"noise.kind": "offset"}, "noise.kind = 'offset' is not a list of values"),
        ({"noise.offset_strenght": [0.1]}, "unknown key 'noise.offset_strenght'; did you mean noise.offset_strength?"),
        ({"noise_offset": [0.1]}, "it is called noise.offset_strength here"),
        ({1: [0.1]}, "unknown key '1'"),
        ({"seed": [0, "1"]}, "seed has the value '1', which is not of type int, such as 0"),
        ({"seed": [0.5]}, "seed has the value 0.5, which is not of type int"),
        ({"noise.offset_strength": [True]}, "has the value True, which is not of type float"),
        ({"noise.random_strength": [1]}, "has the value 1, which is not of type bool"),
        ({"sample.prompts": ["a night"]}, "has the value 'a night', which is not of type tuple"),
        ({"seed": [0, 1, 0]}, "the points seed=0 and seed=0 are the same training"),
        (
            [{"seed": [0]}, {"noise.offset_strength": [0, 0.1]}],
            "the points seed=0 and offset_strength=0.0 are the same",
        ),
        ({"sample.negative_prompt": ["a", "A"]}, "2 points would be called negative_prompt=a"),
        ({"optimizer.b1": [1e-05, 2.0]}, "sweep: b1=2.0: config: optimizer.b1 = 2.0 must be"),
        (
            {"noise.offset_strength": [0, -0.1]},
            "sweep: offset_strength=-0.1: config: noise.offset_strength = -0.1 must",
        ),
    ],
)
def test_a_bad_grid_is_one_line(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], grid: Any, message: str
) -> None:
    assert main(["sweep", f"--config={sweep_file(tmp_path, grid)}", f"--workdir={tmp_path / 'runs'}"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=nowhere.py"], "config: nowhere.py is not a local file"),
        (["--config=configs/stamps.py"], "no function get_grid(); see configs/sweeps/sd15_strength.py for the form"),
        (["--config.seed=3"], "sweep: --config.seed is given, but"),
        (["--config.sed=3"], "unknown key 'sed'"),
        (["--config.sample.negative_prompt=a\tb"], "has a control character"),
        (["--config.loss.min_snr_gamma=-1"], "sweep: seed=0: config: loss.min_snr_gamma = -1.0 must be"),
        (["--list"], "unknown argument --list"),
        (["--workdir="], "--workdir is empty"),
    ],
)
def test_a_bad_argument_is_one_line(
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(ROOT)
    first = [f"--config={sweep_file(tmp_path, {'seed': [0]})}", f"--workdir={tmp_path / 'runs'}"]
    assert main(["sweep", *first, *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_a_line_has_the_state_the_name_and_the_arguments_that_train_it(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = sweep_file(tmp_path, {"sample.prompts": [("a night", 'it\'s "noon"')], "seed": [4]})
    assert main(["sweep", f"--config={file}", f"--workdir={tmp_path}/runs/", "--config.data.path=my data"]) == 0
    [(found, name, command, *arguments)] = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert (found, command) == ("new", "train")
    assert re.fullmatch(r"prompts=a-night-it-s-noon,seed=4-[0-9a-f]{8}", name)
    assert arguments == [
        f"--config={file}",
        f"--workdir={tmp_path}/runs/{name}",
        "--config.data.path=my data",
        """--config.sample.prompts=('a night', 'it\\'s "noon"')""",
        "--config.seed=4",
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny.trained_workdir(tmp_path_factory.getbasetemp())


def test_the_state_is_that_of_the_newest_checkpoint(trained: pathlib.Path, tmp_path: pathlib.Path) -> None:
    file, base = sweep_file(tmp_path, {"seed": [0]}), trained.parent
    [point] = load_points(file)
    data_path = str(tiny.data_path(base))

    def state_with(**changes: Any) -> str:
        config = tiny.run_config(data_path, **changes)
        return state(type(point)(trained.name, (), config), str(base))

    assert state_with() == "done"
    assert state_with(train__steps=7) == "step 6 of 7"
    assert state_with(checkpoint__every_steps=1) == "done"
    with pytest.raises(UserError, match=r"noise.offset_strength = 0.2, but .* was begun with 0.1; set it back"):
        state_with(noise__offset_strength=0.2)  # the file was changed since: what is there is another training
    assert state(point, str(base)) == "new"
    (tmp_path / point.name).mkdir()
    (tmp_path / point.name / "config.json").write_text(to_json(resolve(point.config)))
    assert state(point, str(tmp_path)) == "step 0 of 1000"
    assert newest_step(tmp_path / point.name) == 0
    assert not (tmp_path / point.name / "checkpoints").exists()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_commands_of_a_sweep_file_can_be_typed(file: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / file).read_text()
    lines = re.findall(r"^    launch/sweep\.sh ((?:.*\\\n)*.*)$", text, re.MULTILINE)
    commands = [shlex.split(line.replace("\\\n", " ")) for line in lines]
    assert commands
    for command in commands:
        assert f"--config={file}" in command
        given = [each.removeprefix("--config.").split("=", 1) for each in command if each.startswith("--config.")]
        assert len(load_points(str(file), [(key, value) for key, value in given])) > 3
    for key, value in re.findall(r"`--config\.([\w.]+)=\"?([^`]*?)\"?`", text):
        load_points(str(file), [(key, value)])
