"""The files in `configs/`: their commands can be typed, they go with the published models, and begin as they say."""

import ast
import os
import pathlib
import re
import shlex
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from etils import epath
from jaxtyping import PyTree
from ml_collections import ConfigDict

from offsetjax.cli import main
from offsetjax.config import from_json, load_config, to_json, validate
from offsetjax.data.source import open_source
from offsetjax.errors import UserError
from offsetjax.formats.header import Entry, format_header
from offsetjax.formats.pretrained import open_pretrained
from offsetjax.formats.single_file import to_original
from offsetjax.models.family import family_of
from offsetjax.models.resolve import resolve
from offsetjax.models.weights import on_host, part_tensors
from offsetjax.storage import checkpoint
from offsetjax.training.setup import Run, open_run
from offsetjax.training.states import first_state
from offsetjax.training.step import TrainState
from offsetjax.training.streams import open_stream
from tests import families, tiny
from tests.formats import published

ROOT = pathlib.Path(__file__).parents[2]
# Those of sweeps have commands of their own, and a test beside the sweeps' others.
FILES = sorted(file.relative_to(ROOT) for file in (ROOT / "configs").rglob("*.py") if file.parent.name != "sweeps")
STEMS = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}
KINDS = ("offset", "offset_lora", "pretrain")
# The program that draws a denoiser at random is compiled for each of its arrays: let there be few.
SHALLOW = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64),
    "attention_head_dim": (2, 2),
    "transformer_layers_per_block": (1, 1),
    "layers_per_block": 1,
}


def config_file(family: str, kind: str) -> str:
    return str(ROOT / "configs" / f"{STEMS[family]}_{kind}.py")


def docstring(file: pathlib.Path) -> str:
    return ast.get_docstring(ast.parse((ROOT / file).read_text())) or ""


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What the command would have done: each sub-command's function and its first argument."""
    calls: list[tuple[str, Any]] = []
    places = (
        "train.train",
        "prepare.calibrate.calibrate",
        "exporting.export.export",
        "data.build.build",
        "article.demo.demo",
        "article.pictures.write_folder",
        "article.pictures.write_fine_tuning_folder",
        "prepare.stamps.write_stamps",
        "study.command.study",
    )
    for place in places:
        name = place.rpartition(".")[2]
        monkeypatch.setattr(f"offsetjax.{place}", lambda first, *_, name=name, **__: calls.append((name, first)))
    return calls


@pytest.mark.parametrize("file", FILES, ids=str)
def test_the_commands_of_its_docstring_can_be_typed(
    file: pathlib.Path, called: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    lines = re.findall(r"^    (launch/local\.sh (?:.*\\\n)*.*)$", docstring(file), re.MULTILINE)
    commands = [shlex.split(line.replace("\\\n", " ")) for line in lines]
    for _, *arguments in commands:
        assert main(arguments) == 0, arguments
    trainings = [arguments for _, *arguments in commands if arguments[0] == "train"]
    assert len([name for name, _ in called if name == "train"]) == len(trainings)
    assert f"--config={file}" in {each for arguments in trainings for each in arguments}
    # What is to be added to a command, in the text around it.
    load_config(str(file), re.findall(r"--config\.([\w.]+)=([^\s,;]*\w)", docstring(file)))


@pytest.mark.parametrize("file", FILES, ids=str)
def test_it_quotes_the_plan_of_the_training_that_it_is(file: pathlib.Path) -> None:
    quoted = re.findall(r"`offsetjax plan([^`]*)`", docstring(file))
    own = load_config(str(file)).to_dict()
    for arguments in quoted:
        changes = re.findall(r"--config\.([\w.]+)=(\S+)", arguments)
        assert load_config(str(file), changes).to_dict() == own, arguments


@pytest.mark.parametrize("family", families.FAMILIES)
def test_each_family_can_be_fine_tuned_adapted_and_pretrained(family: str) -> None:
    whole, lora, pretrain = (load_config(config_file(family, kind)) for kind in KINDS)
    for config in (whole, lora, pretrain):
        assert config.model.family == family
        assert config.model.pretrained
        assert config.noise.offset_strength > 0
    assert not whole.lora.rank
    assert lora.lora.rank
    assert (whole.model.from_scratch, lora.model.from_scratch, pretrain.model.from_scratch) == ((), (), ("unet",))
    # The article's 0.1, which hides the mean alike at every size on one schedule; of XL its own report's.
    assert {each.noise.offset_strength for each in (whole, lora)} == {0.05 if family == "sdxl" else 0.1}


@pytest.fixture(scope="module")
def published_file(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """Each family as published, in one file of the original layout and size; its weights are holes in the file."""
    folder, files = tmp_path_factory.mktemp("published"), {}
    for family in families.FAMILIES:
        with torch.device("meta"):
            models = published.models(family, narrow=False)
        parts = {part: published.abstract_tensors(model) for part, model in models.items()}
        tensors, end, entries = to_original(parts, published.configs(family, narrow=False), family), 0, []
        for name, tensor in tensors.items():
            entries.append(Entry(name, np.dtype(np.float16), tensor.shape, end, end := end + 2 * tensor.size))
        header = format_header(entries, {"modelspec.prediction_type": "v" if family == "sd2" else "epsilon"})
        files[family] = folder / f"{family}.safetensors"
        files[family].write_bytes(header)
        os.truncate(files[family], len(header) + end)
    return files


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", families.FAMILIES)
def test_it_goes_with_the_published_model(family: str, kind: str, published_file: dict[str, pathlib.Path]) -> None:
    path = str(published_file[family])
    config = resolve(load_config(config_file(family, kind), [("model.pretrained", path)]))
    validate(config)
    assert config.schedule.prediction_type == ("v_prediction" if family == "sd2" else "epsilon")
    assert config.model.force_zeros_for_empty_prompt == (family == "sdxl")
    assert config.model.unet.block_out_channels[:3] == (320, 640, 1280)
    assert config.model.unet.attention_head_dim == (
        (8,) * 4 if family == "sd1" else tuple(width // 64 for width in config.model.unet.block_out_channels)
    )
    assert (
        sum(config.model[part].hidden_size for part in family_of(config.model).encoders)
        == config.model.unet.cross_attention_dim
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    folder = tmp_path_factory.mktemp("configs")
    tiny.build_data(folder)
    with tiny.quick_compilation(folder):
        yield folder


def begin(base: pathlib.Path, family: str, kind: str, workdir: pathlib.Path) -> tuple[Run, TrainState]:
    """The run of a config, with a narrow model of its family, and its state before the first step."""
    pretrained = families.saved(base, family)
    overrides = {"model.pretrained": pretrained, "data.path": base / "data", "train.global_batch_size": 8}
    overrides |= {"mesh.fsdp": -1, "mesh.data": 1}  # of these devices: those of pretraining are made for more
    config = load_config(config_file(family, kind), [(key, str(value)) for key, value in overrides.items()])
    if config.model.from_scratch:
        narrow = families.narrow_config(family).model
        for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
            config.model[part].update(narrow[part])
        config.model.unet.update(SHALLOW)
    source = open_source(config.data.path)
    run = open_run(config, epath.Path(workdir), source)
    with checkpoint.open_checkpoints(workdir) as manager:
        return run, first_state(run, manager, open_stream(run.config, run.pipeline, source))[0]


def dtypes(tree: PyTree) -> set[str]:
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


def count(tree: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def is_same(tree: PyTree, other: PyTree) -> bool:
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, jax.device_get(tree), jax.device_get(other))))


def loaded(config: ConfigDict, run: Run, part: str) -> PyTree:
    """A part as the pretrained model holds it."""
    pretrained = open_pretrained(config.model.pretrained)
    return on_host(part_tensors(pretrained, part, run.pipeline.parts[part]))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_fine_tuning_begins_with_the_denoiser_of_the_model(
    family: str, base: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run, state = begin(base, family, "offset", tmp_path / "run")
    config, text = run.config, family_of(run.config.model).encoders
    stored = open_pretrained(config.model.pretrained).read_config("scheduler")
    assert config.schedule.prediction_type == stored["prediction_type"]
    assert (config.schedule.prediction_type == "v_prediction") == (family == "sd2")
    assert config.model.force_zeros_for_empty_prompt == (family == "sdxl")
    assert state.params.keys() == {"unet"}
    assert run.frozen.keys() == {"vae", *text}
    assert is_same(state.params["unet"], loaded(config, run, "unet"))
    assert is_same(state.params, state.ema_params)
    assert is_same(run.frozen["vae"], loaded(config, run, "vae"))
    assert dtypes(state.params) == dtypes(state.ema_params) == dtypes(run.frozen["vae"]) == {"float32"}
    assert {kind for part in text for kind in dtypes(run.frozen[part])} == {"bfloat16"}
    # Two moments of each parameter, and a few counters.
    assert 0 <= count(state.opt_state) - 2 * count(state.params) < 10
    shards = [leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(state.params)]
    assert sum(shards) < 0.2 * count(state.params), "a device of eight holds more than its share"


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_lora_training_begins_with_adapters_that_change_nothing(
    family: str, base: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run, state = begin(base, family, "offset_lora", tmp_path / "run")
    text = family_of(run.config.model).encoders
    assert state.params.keys() == {"unet"}
    assert run.frozen.keys() == {"unet", "vae", *text}
    adapters = jax.tree_util.tree_leaves_with_path(state.params)
    assert {path[-1].key for path, _ in adapters} == {"down", "up"}
    assert all(min(leaf.shape) == 16 for _, leaf in adapters)
    assert not any(np.any(leaf) for path, leaf in adapters if path[-1].key == "up")
    assert dtypes(state.params) == dtypes(run.frozen["vae"]) == {"float32"}
    assert {kind for part in ("unet", *text) for kind in dtypes(run.frozen[part])} == {"bfloat16"}
    assert 0 <= count(state.opt_state) - 2 * count(state.params) < 10
    assert count(state.params) < 0.2 * count(run.frozen["unet"])


@pytest.mark.parametrize("family", families.FAMILIES)
def test_pretraining_begins_with_a_random_denoiser_and_the_models_other_parts(
    family: str, base: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run, state = begin(base, family, "pretrain", tmp_path / "run")
    config, text = run.config, family_of(run.config.model).encoders
    assert config.schedule.prediction_type == ("v_prediction" if family == "sd2" else "epsilon")
    assert config.model.force_zeros_for_empty_prompt == (family == "sdxl")
    assert state.params.keys() == {"unet"}
    assert run.frozen.keys() == {"vae", *text}
    kernels = [np.asarray(leaf) for leaf in jax.tree.leaves(state.params) if leaf.ndim > 1]
    assert sum(kernel.std() > 0 for kernel in kernels) > 0.9 * len(kernels)
    assert is_same(run.frozen["vae"], loaded(config, run, "vae"))
    for part in text:
        whole = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), loaded(config, run, part))
        assert is_same(run.frozen[part], whole)
    assert dtypes(state.params) == {"float32"}


def test_an_explicit_default_contradicts_a_checkpoint_like_any_other_value(tmp_path: pathlib.Path) -> None:
    """The article's model predicts v; ε, the default, is replaced where it was not set, and refused where it was."""
    model = f"config.model.pretrained = {str(ROOT / 'configs/article/pretrained')!r}"
    bodies = {"silent": model, "stated": f"{model}\n    config.schedule.prediction_type = 'epsilon'"}
    for name, body in bodies.items():
        (tmp_path / f"{name}.py").write_text(
            "from offsetjax.config import default_config\ndef get_config():\n    config = default_config()\n"
            f"    {body}\n    return config\n"
        )
    silent = load_config(str(tmp_path / "silent.py"))
    assert resolve(silent).schedule.prediction_type == "v_prediction"
    override = load_config(str(tmp_path / "silent.py"), [("schedule.prediction_type", "epsilon")])
    for stated in (load_config(str(tmp_path / "stated.py")), override, from_json(to_json(override))):
        with pytest.raises(UserError, match=r"prediction_type = 'epsilon', but .* has 'v_prediction'; set it to that"):
            resolve(stated)
