"""A family of models that offsetjax does not know trains, resumes, is drawn with, exported and planned for."""

import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from offsetjax.cli import main
from offsetjax.config.families import FAMILIES
from offsetjax.config.schema import SECTIONS
from offsetjax.errors import UserError
from offsetjax.models.trained import load_model, load_trained
from offsetjax.models.weights import abstract_params
from offsetjax.parallel import sharding
from offsetjax.train import train
from tests import tiny
from tests.strangers.patches import tiny_config

ROOT = pathlib.Path(__file__).parents[2]
ENTRY_POINTS = """[offsetjax.families]
patches = tests.strangers.patches:FAMILY
[offsetjax.sections]
model.transformer = tests.strangers.patches:TRANSFORMER
model.patches = tests.strangers.patches:PATCHES
model.words = tests.strangers.patches:WORDS
model.letters = tests.strangers.patches:LETTERS
"""
CONFIG = """from tests.strangers.patches import tiny_config
get_config = lambda: tiny_config({data!r})
"""


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """As if a package with the family were installed, here and in the processes that are started from here."""
    folder = tmp_path_factory.mktemp("site")
    package = folder / "patches-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: patches\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(ENTRY_POINTS)
    compiled = tiny.quick_compilation(tmp_path_factory.getbasetemp())
    with pytest.MonkeyPatch.context() as patch, compiled as environment:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.syspath_prepend(folder)
        for registry in (FAMILIES, SECTIONS):  # what is installed is read once
            patch.setattr(registry, "_points", None)
        paths = [str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("patches")
    tiny.build_data(folder)
    return folder


def _config(base: pathlib.Path, **changes: Any) -> ConfigDict:
    return tiny_config(str(base / "data"), **changes)


def _losses(workdir: pathlib.Path) -> list[float]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def plain(base: pathlib.Path) -> pathlib.Path:
    train(_config(base, mesh__data=-1), base / "plain")
    return base / "plain"


@pytest.fixture(scope="module")
def exported(base: pathlib.Path, plain: pathlib.Path) -> pathlib.Path:
    assert main(["export", f"--workdir={plain}", f"--out={base / 'exported'}"]) == 0
    return base / "exported"


def test_loops_recomputation_and_split_weights_change_no_loss_nor_does_a_resume(
    base: pathlib.Path, plain: pathlib.Path
) -> None:
    """As if the plain training had been stopped after its first checkpoint, and resumed on another mesh."""
    shutil.copytree(plain, base / "split")
    shutil.rmtree(base / "split" / "checkpoints" / "4")
    changes = {"model__remat": "blocks", "model__scan_layers": "always", "mesh__data": -1, "mesh__fsdp": 2}
    train(_config(base, **changes), base / "split")
    starts = [json.loads(line)["step"] for line in (base / "split" / "starts.jsonl").read_text().splitlines()]
    assert starts == [0, 2]
    np.testing.assert_allclose(_losses(base / "split"), _losses(plain), rtol=1e-4)
    assert len(_losses(plain)) == 4
    kernel = load_trained(base / "split").params["transformer"]["layers_0"]["mlp"]["kernel"]
    assert kernel.shape == (16, 16)


def test_its_heads_are_split_as_it_declares(base: pathlib.Path, plain: pathlib.Path) -> None:
    changes = {"mesh__data": -1, "mesh__fsdp": 2, "mesh__tensor": 2, "train__steps": 1}
    train(_config(base, **changes), base / "heads")
    np.testing.assert_allclose(_losses(base / "heads"), _losses(plain)[:1], rtol=1e-5)
    pipeline = load_trained(base / "heads").pipeline
    mesh = sharding.mesh_of(data=2, fsdp=2, tensor=2)
    layer = abstract_params(pipeline.denoiser)["layers_0"]
    places = sharding.specs(mesh, pipeline.sharding, layer)
    assert places["attention"]["to_q"]["kernel"] == P("fsdp", "tensor")
    assert places["attention"]["to_out_0"]["kernel"] == P("tensor", "fsdp")
    assert "tensor" not in places["mlp"]["kernel"]


def test_captions_of_unlike_lengths_reach_the_denoiser(base: pathlib.Path, plain: pathlib.Path) -> None:
    pipeline = load_trained(plain).pipeline
    assert {part: ids.shape for part, ids in pipeline.tokenize(["a red boat", ""]).items()} == {
        "words": (2, 4),
        "letters": (2, 9),
    }
    assert pipeline.tokens("a red boat")[1:] == (10, 9), "the letters are cut the most"


def test_it_is_exported_and_drawn_with(base: pathlib.Path, exported: pathlib.Path) -> None:
    index = json.loads((exported / "model_index.json").read_text())
    assert (index["_class_name"], index["transformer"]) == ("PatchPipeline", ["patches", "PatchTransformer"])
    weights = safetensors.numpy.load_file(exported / "transformer" / "diffusion_pytorch_model.safetensors")
    assert weights["layers.2.attention.to_out.0.weight"].shape == (16, 16)
    prompts = ["--prompt=a red boat", "--num_steps=2"]
    for number, model in enumerate((f"--workdir={base / 'plain'}", f"--model={exported}")):
        assert main(["sample", model, f"--out={base / f'drawn {number}'}", *prompts]) == 0
    first, second = (json.loads((base / f"drawn {number}" / "samples.json").read_text()) for number in range(2))
    assert first["records"][0]["brightness"] == pytest.approx(second["records"][0]["brightness"], abs=2e-3)


def test_it_is_adapted(base: pathlib.Path, exported: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = _config(base, train__steps=2, model__pretrained=str(exported), lora__rank=2, model__remat="full")
    train(config, base / "adapted")
    capsys.readouterr()
    assert set(load_trained(base / "adapted").params) == {"transformer"}
    out = base / "adapters.safetensors"
    command = ["export", f"--workdir={base / 'adapted'}", "--format=lora", f"--out={out}"]
    assert main(command) == 2
    assert "has no layer names of kohya's" in (message := capsys.readouterr().err) and message.count("\n") == 1
    assert "--lora_keys=diffusers, or use --format=diffusers" in message and not out.exists()
    assert main([*command, "--lora_keys=diffusers"]) == 0
    names = set(safetensors.numpy.load_file(out))
    assert "transformer.layers.0.attention.to_q.lora_A.weight" in names and len(names) == 3 * 5 * 2
    assert set(load_model(exported, lora=str(out)).params) == {"transformer"}


def test_a_lora_with_names_of_kohyas_is_refused(
    base: pathlib.Path, exported: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "kohya.safetensors"
    halves = {"lora_down.weight": np.zeros((2, 16), np.float32), "lora_up.weight": np.zeros((16, 2), np.float32)}
    name = "lora_transformer_layers_0_attention_to_q"
    safetensors.numpy.save_file({f"{name}.{half}": array for half, array in halves.items()}, file)
    config = _config(base, model__pretrained=str(exported), lora__pretrained=str(file))
    with pytest.raises(UserError, match=r"lora_transformer_.*kohya's scripts have no names for layers of patches"):
        train(config, tmp_path / "run")


def test_a_layout_that_it_does_not_have_is_refused(
    base: pathlib.Path, plain: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = base / "new" / "single.safetensors"
    assert main(["export", f"--workdir={plain}", "--format=single_file", f"--out={out}"]) == 2
    message = capsys.readouterr().err
    assert "transformer over patches has no single-file layout" in message and "use --format=diffusers" in message
    assert message.count("\n") == 1 and not out.parent.exists()


def test_it_is_planned_for(base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.py").write_text(CONFIG.format(data=str(base / "data")))
    command = ["plan", f"--config={tmp_path / 'config.py'}", "--topology=cpu:8", f"--out={tmp_path / 'plan.json'}"]
    assert main([*command, f"--cache_dir={tmp_path / 'cache'}"]) == 0
    [plan] = json.loads((tmp_path / "plan.json").read_text())
    assert plan["devices"] == 8
    assert plan["parameters"]["trained"] > 16 * 16 * 5 * 3


def test_its_roofline_is_told_by_its_own_parts(base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("libtpu")
    (tmp_path / "config.py").write_text(CONFIG.format(data=str(base / "data")))
    command = ["plan", f"--config={tmp_path / 'config.py'}", "--topology=v5e:2x2", f"--out={tmp_path / 'plan.json'}"]
    assert main([*command, f"--cache_dir={tmp_path / 'cache'}"]) == 0
    [plan] = json.loads((tmp_path / "plan.json").read_text())
    passes = {"patches forward", "transformer forward", "transformer backward"}
    assert passes <= set(plan["seconds_by_part"]) <= passes | {"words forward", "letters forward", "other"}
