"""Import → export → import is bit-exact for each family and form; what is exported loads in PyTorch."""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import safetensors
import safetensors.numpy
import torch

from offsetjax.config import default_config
from offsetjax.errors import UserError
from offsetjax.exporting.export import export
from offsetjax.formats.header import parse_header
from offsetjax.formats.pretrained import open_pretrained
from offsetjax.formats.safetensors import verify_file
from offsetjax.storage.exported import verify_export
from tests import families
from tests.untrained import save_untrained


def imported(model: pathlib.Path, workdir: pathlib.Path, **changes: Any) -> pathlib.Path:
    """A training of no steps from a pretrained model."""
    config = default_config()
    config.model.pretrained = str(model)
    config.optimizer.ema_decay, config.sample.params = 0.0, "raw"
    config.update_from_flattened_dict({path.replace("__", "."): value for path, value in changes.items()})
    save_untrained(config, workdir)
    return workdir


def tensors_of(model: pathlib.Path) -> dict[str, bytes]:
    """Every tensor's type and bytes, by file and name; of a single file by name."""
    files = [model] if model.is_file() else sorted(model.rglob("*.safetensors"))
    found = {}
    for file in files:
        folder = "" if model.is_file() else f"{file.parent.name}/"
        for name, array in safetensors.numpy.load_file(file).items():
            found[folder + name] = str(array.dtype).encode() + array.tobytes()
    return found


def _is_same(one: Any, other: Any) -> bool:
    """Whether two values of a config.json mean the same: a number may stand for one for each block."""
    return one == other or (isinstance(other, list) and {one} == set(other)) if isinstance(one, int) else one == other


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def workdir_of(base: pathlib.Path) -> Callable[[str], pathlib.Path]:
    """The work directory of a family's import, once for the tests of this file; they must leave it as it is."""

    @functools.cache
    def workdir(family: str) -> pathlib.Path:
        return imported(families.saved(base, family), base / f"{family}_run", noise__offset_strength=0.1)

    return workdir


def check_round_trip(original: pathlib.Path, workdir: pathlib.Path, folder: pathlib.Path, dtype: str) -> None:
    """Directory → training of no steps → directory and single file → the same → both again."""
    export(workdir, folder / "directory", dtype=dtype)
    export(workdir, folder / "single.safetensors", form="single_file", dtype=dtype)
    assert tensors_of(folder / "directory") == tensors_of(original)

    again = imported(folder / "single.safetensors", folder / "second")
    export(again, folder / "directory again", dtype=dtype)
    export(again, folder / "single again.safetensors", form="single_file", dtype=dtype)
    assert tensors_of(folder / "directory again") == tensors_of(original)
    assert tensors_of(folder / "single again.safetensors") == tensors_of(folder / "single.safetensors")


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_model_comes_back_bit_for_bit(
    family: str, base: pathlib.Path, workdir_of: Callable[[str], pathlib.Path], tmp_path: pathlib.Path
) -> None:
    original = families.saved(base, family)
    check_round_trip(original, workdir_of(family), tmp_path, "float32")
    verify_export(str(tmp_path / "directory"))
    verify_export(str(tmp_path / "single.safetensors"))
    single = open_pretrained(tmp_path / "single.safetensors")
    for part in ("unet", "vae", "text_encoder"):
        ours = json.loads(json.dumps(single.read_config(part)))
        theirs = json.loads((original / part / "config.json").read_text())
        differing = {key for key, value in ours.items() if key in theirs and not _is_same(theirs[key], value)}
        assert differing <= {"sample_size", "projection_dim", "_diffusers_version", "torch_dtype"}, differing


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=pytest.mark.slow if family != "sd1" else ()) for family in families.FAMILIES]
)
def test_a_model_of_float16_comes_back_bit_for_bit(family: str, base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    original = families.saved(base, family, "float16")
    check_round_trip(original, imported(original, tmp_path / "first"), tmp_path, "float16")


@pytest.mark.parametrize("family", families.FAMILIES)
def test_pytorch_loads_the_single_file(
    family: str, base: pathlib.Path, workdir_of: Callable[[str], pathlib.Path], tmp_path: pathlib.Path
) -> None:
    original = families.saved(base, family)
    export(workdir_of(family), tmp_path / "model.safetensors", form="single_file")
    kind = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    options = {"config": str(original), "local_files_only": True}
    options |= {} if family == "sdxl" else {"safety_checker": None}
    theirs, ours = kind.from_pretrained(original), kind.from_single_file(tmp_path / "model.safetensors", **options)
    for part in ("unet", "vae", "text_encoder", *(("text_encoder_2",) if family == "sdxl" else ())):
        expected, found = getattr(theirs, part).state_dict(), getattr(ours, part).state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected), part


def test_a_large_model_is_split_and_an_index_says_where(
    base: pathlib.Path, workdir_of: Callable[[str], pathlib.Path], tmp_path: pathlib.Path
) -> None:
    export(workdir_of("sd1"), tmp_path / "model", max_shard_gb=0.002)
    assert len(list((tmp_path / "model" / "unet").glob("*-of-*.safetensors"))) > 2
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "model" / "unet")
    expected = diffusers.UNet2DConditionModel.from_pretrained(families.saved(base, "sd1") / "unet").state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in theirs.state_dict().items())
    again = imported(tmp_path / "model", tmp_path / "again")
    export(again, tmp_path / "whole")
    assert tensors_of(tmp_path / "whole") == tensors_of(families.saved(base, "sd1"))


def test_one_bit_of_any_exported_tensor_is_told(
    workdir_of: Callable[[str], pathlib.Path], tmp_path: pathlib.Path
) -> None:
    export(workdir_of("sd1"), tmp_path / "model")
    export(workdir_of("sd1"), tmp_path / "model.safetensors", form="single_file")
    files = [*tmp_path.glob("model/*/*.safetensors"), tmp_path / "model.safetensors"]
    assert len(files) == 4
    for file in files:
        damage_every_tensor(file)
        with pytest.raises(UserError, match=r"damaged: .* and \d+ more differ"):
            verify_file(file, "checkpoint")
    for model in (tmp_path / "model", tmp_path / "model.safetensors"):
        opened = open_pretrained(model)
        for part in ("unet", "vae", "text_encoder"):
            for tensor in opened.tensors(part).values():
                with pytest.raises(
                    UserError, match=r"^model\.pretrained: .* is damaged: \S+ differs from the checksum"
                ):
                    tensor()


def damage_every_tensor(file: pathlib.Path) -> None:
    """Flips the lowest bit of the last number of each."""
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    for entry in parse_header(bytes(data[8:start]))[0]:
        data[start + entry.end - entry.dtype.itemsize] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("form", "family", "architecture"),
    [
        ("diffusers", "sd1", "stable-diffusion-v1"),
        ("single_file", "sd2", "stable-diffusion-v2-768-v"),
        ("single_file", "sdxl", "stable-diffusion-xl-v1-base"),
    ],
)
def test_the_header_says_what_it_is(
    form: str,
    family: str,
    architecture: str,
    workdir_of: Callable[[str], pathlib.Path],
    tmp_path: pathlib.Path,
) -> None:
    out = tmp_path / "model.safetensors"
    export(workdir_of(family), out, form=form)
    file = out if form == "single_file" else out / "unet" / "diffusion_pytorch_model.safetensors"
    with safetensors.safe_open(file, "np") as opened:
        header = opened.metadata()
    assert header["modelspec.architecture"] == architecture
    assert float(header["ss_noise_offset"]) == 0.1
    assert header["format"] == "pt"
