"""Directories as PyTorch writes them, in pieces and in variants, are opened; what cannot be used is refused."""

import json
import pathlib
import shutil
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
import transformers

from offsetjax.config.families import FAMILIES
from offsetjax.errors import UserError
from offsetjax.formats import diffusers as files
from offsetjax.formats.pretrained import open_pretrained
from offsetjax.formats.tensors import of_array
from tests import torch_models
from tests.formats import published

PARTS = {
    "sd1": ("unet", "vae", "text_encoder"),
    "sd2": ("unet", "vae", "text_encoder"),
    "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2"),
}


@pytest.fixture(scope="module")
def small() -> dict[str, torch.nn.Module]:
    """The smallest models of `torch_models`, in two dtypes apart: what was read tells which files it came from."""
    return {"unet": torch_models.unet(), "vae": torch_models.vae(), "text_encoder": torch_models.text_encoder()}


@pytest.fixture(scope="module")
def saved(small: dict[str, torch.nn.Module], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("saved")
    torch_models.save_pipeline(directory, **small)
    return directory


@pytest.fixture
def copy(saved: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(saved, tmp_path / "model"))


def assert_read(directory: pathlib.Path, models: dict[str, torch.nn.Module], variant: str = "") -> None:
    pretrained = open_pretrained(directory, variant)
    for part, model in models.items():
        found, expected = pretrained.tensors(part), model.state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            np.testing.assert_array_equal(found[name](), published.to_numpy(tensor), strict=True, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("max_shard_size", ["10GB", "20KB"])
@pytest.mark.parametrize("variant", ["", "fp16"])
def test_what_pytorch_writes_is_read(
    dtype: torch.dtype, max_shard_size: str, variant: str, tmp_path: pathlib.Path
) -> None:
    made = {"unet": torch_models.unet(), "text_encoder": torch_models.text_encoder()}
    models = {part: model.to(dtype) for part, model in made.items()}
    for part, model in models.items():
        model.save_pretrained(tmp_path / part, max_shard_size=max_shard_size, variant=variant or None)
        indices = list((tmp_path / part).glob("*.index*.json"))
        assert len(indices) == (max_shard_size == "20KB") and all(variant in index.name for index in indices)
    assert_read(tmp_path, models, variant)
    assert_read(tmp_path, models)  # where there is one variant, it need not be named


def test_the_former_name_of_a_variants_index_is_known(tmp_path: pathlib.Path) -> None:
    model = torch_models.unet()
    model.save_pretrained(tmp_path / "unet", max_shard_size="20KB")
    stem = "diffusion_pytorch_model"
    text = (tmp_path / "unet" / f"{stem}.safetensors.index.json").read_text()
    for file in (tmp_path / "unet").glob("*-of-*"):
        renamed = file.name.replace(".safetensors", ".fp16.safetensors")
        text = text.replace(file.name, renamed)
        file.rename(file.with_name(renamed))
    (tmp_path / "unet" / f"{stem}.safetensors.index.json").unlink()
    (tmp_path / "unet" / f"{stem}.fp16.safetensors.index.json").write_text(text)
    assert_read(tmp_path, {"unet": model}, "fp16")


def test_a_variant_is_chosen_and_the_plain_files_otherwise(
    copy: pathlib.Path, small: dict[str, torch.nn.Module]
) -> None:
    half = torch_models.unet().half()
    half.save_pretrained(copy / "unet", variant="fp16")
    assert_read(copy, small)
    assert_read(copy, {**small, "unet": half}, "fp16")  # the parts that lack it are read without
    with pytest.raises(UserError, match=r"model\.variant: .* has no weights 'ema'; it has fp16, the plain files"):
        open_pretrained(copy, "ema")
    (copy / "unet" / "diffusion_pytorch_model.safetensors").rename(
        copy / "unet" / "diffusion_pytorch_model.non_ema.safetensors"
    )
    assert_read(copy, {**small, "unet": half}, "fp16")
    with pytest.raises(UserError, match=r"has the variants fp16, non_ema; name one in model\.variant"):
        open_pretrained(copy).tensors("unet")


@pytest.mark.parametrize("family", published.FAMILIES)
def test_each_family_is_recognised_by_its_directory(family: str, tmp_path: pathlib.Path) -> None:
    models = published.models(family)
    for part, model in models.items():
        model.save_pretrained(tmp_path / part)
    pretrained = open_pretrained(tmp_path)
    assert (pretrained.family, pretrained.layout, pretrained.carried()) == (family, "diffusers", {})
    assert all(pretrained.has(part) for part in PARTS[family])
    assert not pretrained.has("scheduler") and not pretrained.has("model_index")
    assert pretrained.has("text_encoder_2") == (family == "sdxl")
    shutil.rmtree(tmp_path / "unet")  # drawn at random
    assert open_pretrained(tmp_path).family == family
    for part in PARTS[family][2:]:
        shutil.rmtree(tmp_path / part)
    assert open_pretrained(tmp_path).family == ""  # an autoencoder's training needs none


def change(file: pathlib.Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("StableDiffusion3Pipeline", r"is a StableDiffusion3Pipeline, .*supported families \(Stable Diffusion 1\.x"),
        ("FluxPipeline", "is a FluxPipeline, which is not one of the supported families"),
        ("StableDiffusionInpaintPipeline", "is a StableDiffusionInpaintPipeline"),
        (3, "is a 3, which is not one"),
    ],
)
def test_other_pipelines_are_refused(name: Any, message: str, copy: pathlib.Path) -> None:
    change(copy / "model_index.json", _class_name=name)
    with pytest.raises(UserError, match=message):
        open_pretrained(copy)


def test_the_refiner_and_inpainting_are_refused(copy: pathlib.Path) -> None:
    change(copy / "unet" / "config.json", in_channels=9)
    with pytest.raises(UserError, match="9 input channels, for inpainting"):
        open_pretrained(copy)
    (copy / "text_encoder").rename(copy / "text_encoder_2")
    with pytest.raises(UserError, match="is the refiner of SDXL"):
        open_pretrained(copy)


def test_half_written_directories_are_told_in_one_line(copy: pathlib.Path) -> None:
    (copy / "vae" / "config.json").unlink()
    (copy / "unet" / files.stem("unet")).with_suffix(".safetensors").unlink()
    (copy / "text_encoder" / "config.json").write_text("[]")
    pretrained = open_pretrained(copy)
    for action, message in (
        (lambda: pretrained.read_config("vae"), r"vae/config\.json is missing; give a whole diffusers directory"),
        (lambda: pretrained.tensors("unet"), r"unet/diffusion_pytorch_model\.safetensors is missing; fetch the whole"),
        (lambda: pretrained.read_config("text_encoder"), r"text_encoder/config\.json is no configuration"),
        (lambda: pretrained.read_config("text_encoder_2"), r"text_encoder_2/config\.json is missing"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            action()
        assert str(caught.value).startswith(f"model.pretrained: {copy}") and "\n" not in str(caught.value)


def test_a_missing_shard_is_named(tmp_path: pathlib.Path) -> None:
    torch_models.unet().save_pretrained(tmp_path / "unet", max_shard_size="20KB")
    missing = sorted((tmp_path / "unet").glob("*-of-*"))[1]
    missing.unlink()
    with pytest.raises(UserError, match=rf"{missing.name} is missing, which .*index\.json names"):
        open_pretrained(tmp_path).tensors("unet")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.fp16.bin", "model.pt"])
def test_a_pickle_is_not_opened(name: str, copy: pathlib.Path) -> None:
    file = copy / "text_encoder" / "model.safetensors"
    file.rename(file.with_name(name))
    with pytest.raises(UserError, match=rf"{name} is a pickle, .*convert it to safetensors, .*from_pretrained"):
        open_pretrained(copy).tensors("text_encoder")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("runwayml/stable-diffusion-v1-5", "is neither a diffusers directory nor a .safetensors file; to fetch"),
        ("nowhere.safetensors", r"nowhere\.safetensors is missing"),
        ("empty", "holds none of unet, vae, text_encoder, text_encoder_2; is it a diffusers directory"),
    ],
)
def test_what_is_no_model_is_refused(path: str, message: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        open_pretrained(tmp_path / path)


def test_a_single_file_has_no_variants(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"model\.variant: 'fp16' cannot apply"):
        open_pretrained(tmp_path / "m.safetensors", "fp16")


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_pytorch_reads_what_is_written(
    dtype: str | None, max_shard_bytes: int, small: dict[str, torch.nn.Module], tmp_path: pathlib.Path
) -> None:
    classes = {"unet": diffusers.UNet2DConditionModel, "text_encoder": transformers.CLIPTextModel}
    for part, kind in classes.items():
        model = small[part]
        config = model.config if part == "unet" else json.loads(model.config.to_json_string())
        options = {"dtype": dtype, "metadata": {"ss_seed": "1"}, "max_shard_bytes": max_shard_bytes}
        files.write_part(tmp_path, part, dict(config), published.tensors(model), **options)
        written = sorted((tmp_path / part).glob("*.safetensors"))
        assert (len(written) == 1) == (max_shard_bytes > 10**6)
        for file in written:
            header = safetensors.safe_open(file, "pt").metadata()
            assert header.pop("offsetjax.crc32") and header == {"format": "pt", "ss_seed": "1"}
        loaded = kind.from_pretrained(tmp_path / part, torch_dtype=getattr(torch, dtype or "float32"))
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor.to(getattr(torch, dtype or "float32"))), name
    assert open_pretrained(tmp_path).metadata() == {"format": "pt", "ss_seed": "1"}


@pytest.mark.parametrize("family", published.FAMILIES)
def test_the_index_is_the_one_that_pytorch_writes(family: str, tmp_path: pathlib.Path) -> None:
    empty: dict[str, Any] = dict.fromkeys(("image_encoder", "feature_extractor"))
    models = published.models(family) if family != "sd2" else published.models("sd1")
    torch_models.save_pipeline(tmp_path / "t")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "t" / "tokenizer")
    parts = models | empty | {"tokenizer": tokenizer, "scheduler": torch_models.scheduler()}
    if family == "sdxl":
        options = {"tokenizer_2": tokenizer, "force_zeros_for_empty_prompt": False}
        diffusers.StableDiffusionXLPipeline(**parts, **options).save_config(tmp_path)
    else:
        options = {"safety_checker": None, "requires_safety_checker": False}
        diffusers.StableDiffusionPipeline(**parts, **options).save_config(tmp_path)
    theirs = json.loads((tmp_path / "model_index.json").read_text())
    described = FAMILIES[family].files
    entries = described.index({"force_zeros_for_empty_prompt": False})
    files.write_index(tmp_path, described.pipeline, "DDIMScheduler", entries)
    assert json.loads((tmp_path / "model_index.json").read_text()) == theirs
    assert files.Directory(files.epath.Path(tmp_path)).read_config("model_index") == theirs


def test_a_work_directorys_part_is_its_own(tmp_path: pathlib.Path) -> None:
    tensors = {"conv.weight": of_array(np.ones((2, 2), np.float16))}
    files.write_part(tmp_path, "vae", {}, tensors)
    np.testing.assert_array_equal(files.open_part(tmp_path, "vae")["conv.weight"](), np.ones((2, 2), np.float16))
    with pytest.raises(UserError, match=r"^workdir: .*unet.* is missing"):
        files.open_part(tmp_path, "unet")
