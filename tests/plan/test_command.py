"""`offsetjax plan` of a tiny model: its figures against arithmetic, what it refuses, that it leaves nothing behind."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import pytest

from offsetjax.cli import main
from offsetjax.config import load_config
from offsetjax.errors import UserError
from offsetjax.models.weights import abstract_trained
from offsetjax.plan.program import architecture
from offsetjax.training.abstract import abstract_frozen, abstract_pipeline, abstract_state, model_flops
from tests.tiny import tiny_config, update_of

ROOT = pathlib.Path(__file__).parents[2]
SD2 = str(ROOT / "configs" / "sd21_offset.py")

TINY = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.tiny import tiny_config

def get_config():
    return tiny_config(train__global_batch_size=16, train__steps=900, mesh__fsdp=4, model__remat="blocks")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("plan")
    (folder / "tiny.py").write_text(TINY)
    return folder


def planned(folder: pathlib.Path, *arguments: str) -> list[dict[str, Any]]:
    out = folder / "plan.json"
    config, cache = f"--config={folder / 'tiny.py'}", f"--cache_dir={folder / 'cache'}"
    assert main(["plan", config, cache, f"--out={out}", *arguments]) == 0
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def on_cpu(folder: pathlib.Path) -> dict[str, Any]:
    return planned(folder, "--topology=cpu:8")[0]


@pytest.fixture(scope="module")
def on_tpu(folder: pathlib.Path) -> dict[str, Any]:
    pytest.importorskip("libtpu")
    return planned(folder, "--topology=v5e:2x4")[0]


def test_memory_is_that_of_the_shards(on_cpu: dict[str, Any]) -> None:
    config = tiny_config(train__global_batch_size=16)
    pipeline = abstract_pipeline(config)
    state = abstract_state(abstract_trained(pipeline, config.lora), update_of(config))
    frozen = abstract_frozen(pipeline)
    elements = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    memory = on_cpu["bytes_per_device"]
    assert on_cpu["mesh"]["data"] == 2 and on_cpu["mesh"]["fsdp"] == 4
    assert on_cpu["parameters"]["trained"] == elements
    assert on_cpu["parameters"]["frozen"] == sum(leaf.size for leaf in jax.tree.leaves(frozen))
    # In four parts, but for what is small; two moments and a count; an average.
    assert 4 * elements / 4 < memory["params"] < 4 * elements / 3
    assert memory["ema_params"] == memory["params"]
    assert memory["opt_state"] == pytest.approx(2 * memory["params"], abs=64)
    assert memory["batch"] == 2 * (16 * 16 * 3 + 8 * 4 + 6 * 4 + 2)
    parts = ("params", "opt_state", "ema_params", "frozen", "batch", "temporary")
    assert memory["total"] == sum(memory[part] for part in parts)
    assert on_cpu["optimizer_bytes_a_parameter"] == pytest.approx(8, rel=1e-3)  # AdamW's two averages
    assert on_cpu["checkpoint_bytes"] == pytest.approx(4 * 4 * elements, rel=1e-3)


def test_flops_are_those_of_the_model(on_cpu: dict[str, Any]) -> None:
    config = tiny_config(train__global_batch_size=16)
    flops = on_cpu["flops_per_device"]
    assert 8 * flops["model"] == model_flops(config, abstract_pipeline(config))
    # What the compiler made of it does as much, and somewhat more where it splits badly.
    assert flops["model"] < 1.05 * flops["compiled"]
    assert flops["compiled"] < 3 * flops["model"]


def test_gradients_are_exchanged(on_cpu: dict[str, Any]) -> None:
    exchanged = sum(each["bytes"] for each in on_cpu["collectives"])
    assert exchanged > on_cpu["bytes_per_device"]["params"]
    assert {each["over"] for each in on_cpu["collectives"]} == {"ici"}


def test_what_is_not_known_of_a_cpu_is_left_out(on_cpu: dict[str, Any]) -> None:
    assert on_cpu["bytes_per_device"]["fits"] is None
    assert set(on_cpu["seconds"].values()) == {None}
    assert "mfu" not in on_cpu and "hours" not in on_cpu


def test_the_same_program_is_not_compiled_twice(
    folder: pathlib.Path, on_cpu: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    again = planned(folder, "--topology=cpu:8")[0]
    assert "cached" in capsys.readouterr().out
    assert again["compiled"]["is_cached"] and not on_cpu["compiled"]["is_cached"]
    assert {**again, "compiled": None} == {**on_cpu, "compiled": None}
    assert again["compiled"]["program"] == on_cpu["compiled"]["program"]


def test_a_plan_for_a_tpu_without_one(on_tpu: dict[str, Any], on_cpu: dict[str, Any]) -> None:
    assert on_tpu["chips"] == 8
    for part in ("params", "opt_state", "frozen", "batch"):
        assert on_tpu["bytes_per_device"][part] == on_cpu["bytes_per_device"][part]
    assert on_tpu["bytes_per_device"]["fits"]
    assert on_tpu["flops_per_device"]["model"] == on_cpu["flops_per_device"]["model"]
    seconds = on_tpu["seconds"]
    assert 0 < seconds["matrix"] < seconds["roofline"]
    assert seconds["cycles"] is None  # known after code generation alone
    fastest, slowest = on_tpu["step_seconds"]
    assert max(seconds["roofline"], seconds["ici"]) == pytest.approx(fastest)
    assert seconds["roofline"] + seconds["ici"] + seconds["dcn"] == pytest.approx(slowest)
    assert on_tpu["images_per_second"] == pytest.approx([16 / fastest, 16 / slowest])
    assert on_tpu["mfu"][0] == pytest.approx(on_tpu["flops_per_device"]["model"] / 197e12 / fastest)
    assert on_tpu["chip_hours"] == pytest.approx([8 * hours for hours in on_tpu["hours"]])
    assert on_tpu["hours"][0] == pytest.approx(900 * fastest / 3600)


def test_the_roofline_is_told_by_parts_and_passes(on_tpu: dict[str, Any]) -> None:
    parts = on_tpu["seconds_by_part"]
    passes = {"text_encoder forward", "vae forward", "unet forward", "unet again", "unet backward"}
    assert set(parts) == passes | {"other"}
    assert sum(parts.values()) == pytest.approx(on_tpu["seconds"]["roofline"])
    assert parts["unet backward"] > parts["unet forward"]


@pytest.mark.slow
def test_generated_code_tells_its_cycles(folder: pathlib.Path) -> None:
    pytest.importorskip("libtpu")
    full, quick = (planned(folder, "--topology=v5e:2x4", *more)[0] for more in (["--full"], []))
    assert full["compiled"]["program"] != quick["compiled"]["program"]
    assert full["seconds"]["cycles"] > full["seconds"]["roofline"]
    assert full["step_seconds"][0] == pytest.approx(full["seconds"]["cycles"])
    for figure in ("bytes_per_device", "flops_per_device", "collectives"):
        assert full[figure] == quick[figure]


@pytest.mark.slow
def test_slices_exchange_over_dcn(folder: pathlib.Path) -> None:
    pytest.importorskip("libtpu")
    two = planned(folder, "--topology=v5e:2x2", "--num_slices=2")[0]
    assert (two["chips"], two["mesh"]["data"]) == (8, 2)
    between = [each for each in two["collectives"] if each["over"] == "dcn"]
    assert {each["kind"] for each in between} == {"all-reduce"}
    gradients = two["bytes_per_device"]["params"]
    assert sum(each["bytes"] for each in between) == pytest.approx(gradients, rel=0.1)  # each its share
    assert two["seconds"]["dcn"] > 0


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_an_answer_and_the_largest_is_found(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("libtpu")
    batch = 8 * 2**19
    plan = planned(folder, "--topology=v5e:2x4", "--search", f"--config.train.global_batch_size={batch}")[0]
    memory, largest = plan["bytes_per_device"], plan["largest_batch"]
    assert memory["fits"] is False
    assert memory["total"] > memory["hbm"]
    assert "does not fit: needs" in capsys.readouterr().out
    assert 0 < largest["batch_per_device"] < 2**19
    assert 0.9 * memory["hbm"] < largest["total"] <= memory["hbm"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--topology=v5litepod-16",), ("v5litepod-16", "v5e:4x4")),
        (("--topology=v5e",), ("v5e has no shape", "v5e:4x4")),
        (("--topology=cpu:many",), ("cpu:many", "cpu:8")),
        (("--topology=cpu:8", "--num_slices=2"), ("--num_slices=2 cannot apply",)),
        (("--topology=v5e:2x4", "--num_slices=0"), ("--num_slices=0",)),
        (("--topology=cpu:8", "--out=/dev/null/plan.json"), ("/dev/null is a file",)),
        (("--topology=cpu:8", "--config.train.global_batch_size=12"), ("global_batch_size", "= 12", "8 devices")),
        (("--topology=cpu:8", "--config.model.family=sd2", "--config.model.pretrained=gone"), ("model.",)),
        (("--topology=cpu:8", "--search"), ("--search cannot apply", "cpu:8")),
    ],
)
def test_a_mistake_is_one_line(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    before = set(folder.iterdir())
    config, cache = f"--config={folder / 'tiny.py'}", f"--cache_dir={folder / 'cache'}"
    assert main(["plan", config, cache, *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("offsetjax: error: ")
    for word in words:
        assert word in error
    assert set(folder.iterdir()) - before <= {folder / "cache"}


def test_a_shape_that_cannot_be_had_is_answered_by_some_that_can(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("libtpu")
    assert main(["plan", f"--config={folder / 'tiny.py'}", "--topology=v5p:1x1x1"]) == 2
    assert "v5p:2x2x1" in capsys.readouterr().err.splitlines()[-1]


def test_a_missing_compiler_is_told(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["plan", f"--config={folder / 'tiny.py'}", "--topology=v5e:2x4"]) == 2
    assert "offsetjax[tpu]" in capsys.readouterr().err


def test_an_architecture_that_is_not_there_is_its_familys(tmp_path: pathlib.Path) -> None:
    planned = architecture(load_config(SD2))
    assert planned.model.unet.cross_attention_dim == 1024
    assert planned.model.text_encoder.num_hidden_layers == 23
    assert planned.model.pretrained == ""


def test_adapters_to_start_from_are_planned_by_the_rank_that_is_given() -> None:
    """Neither they nor their model are there: without a rank the whole model would be planned."""
    lora = [("lora.pretrained", "gone.safetensors")]
    with pytest.raises(UserError, match=r"lora.pretrained = 'gone.safetensors' .*; give it as lora.rank"):
        architecture(load_config(SD2, lora))
    assert architecture(load_config(SD2, [*lora, ("lora.rank", "16")])).lora.rank == 16


@pytest.mark.parametrize("way", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)], ids=str)
def test_nothing_goes_on_when_it_is_stopped(folder: pathlib.Path, tmp_path: pathlib.Path, way: int) -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "offsetjax", "plan", f"--config={folder / 'tiny.py'}", "--topology=cpu:8"]
    process = subprocess.Popen(
        [*command, f"--cache_dir={tmp_path / 'cache'}"], env=environment, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "lowering" in line:
            break
    children = _children(process.pid)
    assert children
    process.send_signal(way)
    process.wait(30)
    process.stderr.close()
    deadline = time.monotonic() + 20
    while any(pathlib.Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(pathlib.Path(f"/proc/{child}").exists() for child in children)
    if way == signal.SIGINT:
        assert process.returncode == 130
        assert not any(tmp_path.iterdir())


def _children(parent: int) -> list[int]:
    """The processes that have this parent."""
    found = []
    for file in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == parent:
            found.append(int(file.parent.name))
    return found
