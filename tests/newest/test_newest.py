"""The newest diffusers, transformers and peft load and draw what is exported, and what they save is read.

The test environment has the last diffusers with Flax and the last transformers of version 4; users have newer ones. An
environment of these is installed for the tests of this file, or given in OFFSETJAX_NEWEST_VENV.
"""

import functools
import os
import pathlib
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath
from flax.traverse_util import flatten_dict

from offsetjax.exporting.export import export
from offsetjax.formats.lora import read_lora, write_lora
from offsetjax.models.family import FAMILIES
from offsetjax.models.lora import init_adapters
from offsetjax.models.pipeline import build
from tests import families
from tests.exporting.test_round_trip import imported, tensors_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

_PACKAGES = ("torch==2.13.0", "diffusers>0.39", "transformers>=5", "peft", "accelerate", "safetensors")
_DRAW = pathlib.Path(__file__).with_name("draw.py")
RANK, ALPHA = 4, 2.0


@pytest.fixture(scope="session")
def newest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The Python of the environment with the newest releases."""
    if given := os.environ.get("OFFSETJAX_NEWEST_VENV"):
        yield f"{given}/bin/python"
        return
    folder = tmp_path_factory.mktemp("newest")
    venv.create(folder, with_pip=True)
    subprocess.run([folder / "bin/pip", "install", "--quiet", *_PACKAGES], check=True)
    yield str(folder / "bin/python")


def draw(python: str, model: pathlib.Path, folder: pathlib.Path, **options: pathlib.Path) -> np.ndarray:
    """What a pipeline draws in an environment, from latents that are the same in all."""
    out = folder / "drawn.npy"
    given = [f"--{name}={value}" for name, value in options.items()]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [python, str(_DRAW), str(model), str(out), *given], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(out)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def exported(base: pathlib.Path) -> Callable[[str], pathlib.Path]:
    """A folder with a family's model as it was, `original`, and in both forms as it is exported."""

    @functools.cache
    def folder(family: str) -> pathlib.Path:
        place = base / f"{family}_exported"
        workdir = imported(families.saved(base, family), base / f"{family}_run")
        export(workdir, place / "directory")
        export(workdir, place / "single.safetensors", form="single_file")
        return place

    return folder


def adapters_of(family: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Random adapters of all parts that are trained, and what they adapt."""
    pipeline = build(families.narrow_config(family))
    parts = {part: pipeline.parts[part] for part in (pipeline.family.denoiser, *pipeline.family.encoders)}
    like = {part: jax.eval_shape(model.init, jax.random.key(0)) for part, model in parts.items()}
    rng = np.random.default_rng(3)
    adapters = {
        part: jax.tree.map(
            lambda array: rng.normal(0.0, 0.1, array.shape).astype(np.float32),
            init_adapters(jax.random.key(0), each, ("to_q", "to_v") if part == "unet" else ("q_proj", "fc1"), RANK),
        )
        for part, each in like.items()
    }
    return adapters, like


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_model_is_drawn_as_by_the_pinned_releases(
    family: str, newest: str, exported: Callable[[str], pathlib.Path], tmp_path: pathlib.Path
) -> None:
    there = exported(family)
    expected = draw(sys.executable, there / "directory", tmp_path)
    by_directory = draw(newest, there / "directory", tmp_path)
    by_file = draw(newest, there / "directory", tmp_path, single=there / "single.safetensors")
    for found in (by_directory, by_file):
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("family", families.FAMILIES)
def test_what_they_save_is_read(
    family: str, newest: str, base: pathlib.Path, exported: Callable[[str], pathlib.Path], tmp_path: pathlib.Path
) -> None:
    """The same tensors, and tokenizers that give the same ids, whose files are others than those of version 4."""
    draw(newest, exported(family) / "directory", tmp_path, save=tmp_path / "saved")
    export(imported(tmp_path / "saved", tmp_path / "run"), tmp_path / "again")
    original = families.saved(base, family)
    assert tensors_of(tmp_path / "again") == tensors_of(original)
    tokenizing = FAMILIES[family].tokenizing
    for folder in tokenizing.folders.values():
        ours, theirs = (tokenizing.load(epath.Path(each) / folder) for each in (original, tmp_path / "saved"))
        for caption in ("", "a red boat", "ÄÖÜ naïve 東京 🚢", families.LONG):
            expected, found = (tokenizing.tokenize(each, caption) for each in (ours, theirs))
            np.testing.assert_array_equal(found[0], expected[0])
            assert found[1] == expected[1]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_lora_is_drawn_and_read_back(
    family: str, newest: str, exported: Callable[[str], pathlib.Path], tmp_path: pathlib.Path
) -> None:
    model = exported(family) / "directory"
    adapters, like = adapters_of(family)
    names = {"family": family, "kohya": FAMILIES[family].files.kohya}
    plain = draw(newest, model, tmp_path)
    for keys in ("diffusers", "kohya"):
        file = tmp_path / f"{keys}.safetensors"
        write_lora(file, adapters, base_like=like, **names, rank=RANK, alpha=ALPHA, keys=keys)
        found = draw(newest, model, tmp_path, lora=file, save_lora=tmp_path / f"{keys}_saved")
        assert np.abs(found - plain).max() > 1e-2 * np.abs(plain).max()
        loaded = read_lora(tmp_path / f"{keys}_saved" / "pytorch_lora_weights.safetensors", like, **names)
        assert (loaded.rank, loaded.alpha) == (RANK, ALPHA)
        # diffusers 0.42.1 with transformers 5.24 passes over the text encoders of any file with kohya's keys.
        read = {part: each for part, each in adapters.items() if keys == "diffusers" or part == "unet"}
        assert read.keys() <= loaded.adapters.keys()
        ours, theirs = (flatten_dict({part: each[part] for part in read}) for each in (adapters, loaded.adapters))
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(array, theirs[path]) for path, array in ours.items())
        if keys == "diffusers":
            expected = draw(sys.executable, model, tmp_path, lora=file)
            assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
