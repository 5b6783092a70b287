"""Pictures of a model are the same wherever it lies, on one device and on eight; two models are seen side by side.

The training here takes no steps, so that all that differs between the untouched model and its export is the noise.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from ml_collections import ConfigDict
from PIL import Image

from offsetjax.cli import main
from offsetjax.config import default_config
from offsetjax.errors import UserError
from offsetjax.exporting.export import export
from offsetjax.models.tokenizer import clip_tokenizer, save_tokenizer
from offsetjax.models.trained import load_model
from offsetjax.sampling.pictures import Picture, side_by_side
from offsetjax.sampling.sample import make_sampler
from tests import torch_models
from tests.tiny import quick_compilation
from tests.untrained import save_untrained

ROOT = pathlib.Path(__file__).parents[2]
PROMPTS, SEEDS = ("a dark alley in a rainstorm", "a ski slope on a sunny day"), (3, 8)
REQUESTS = [(prompt, seed) for prompt in PROMPTS for seed in SEEDS]
SIZE = 32  # of the training's pictures; the untouched model's own is 16
UNET = "unet/diffusion_pytorch_model.safetensors"


def save_model(directory: pathlib.Path) -> None:
    """A model of which a single file says all: heads, groups and the vocabulary are those that all of SD 1.x have."""
    wide = {"block_out_channels": (32, 64), "norm_num_groups": 32}
    torch_models.save_pipeline(
        directory,
        unet=torch_models.unet(**wide, attention_head_dim=8),
        vae=torch_models.vae(**wide),
        text_encoder=torch_models.text_encoder(vocab_size=49408, max_position_embeddings=77, num_attention_heads=1),
    )
    save_tokenizer(clip_tokenizer(), directory / "tokenizer")


def begin(model: pathlib.Path, workdir: pathlib.Path, **noise: Any) -> None:
    """A training of no steps, with a checkpoint."""
    config = default_config()
    config.model.pretrained, config.model.dtype, config.data.resolution = str(model), "float32", SIZE
    config.optimizer.ema_decay, config.sample.params = 0.0, "raw"
    config.noise.update(noise)
    save_untrained(config, workdir)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    """An untouched model, a training of it with offset noise, and its exports."""
    base = tmp_path_factory.mktemp("models")
    save_model(base / "model")
    with quick_compilation(tmp_path_factory.getbasetemp()):
        begin(base / "model", base / "run", offset_strength=0.5)
        export(base / "run", base / "exported")
        export(base / "run", base / "exported.safetensors", form="single_file")
        yield base


def arguments(which: str, out: pathlib.Path, *more: str) -> list[str]:
    settings = ("--num_steps=2", "--guidance_scale=2", *(f"--seed={seed}" for seed in SEEDS))
    return ["sample", which, f"--out={out}", *settings, *(f"--prompt={prompt}" for prompt in PROMPTS), *more]


def pictures_in(folder: pathlib.Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("samples_*.png"))]).astype(int)


def draw(which: str, out: pathlib.Path, *more: str) -> np.ndarray:
    """The pictures that the command draws, `[prompts x seeds, H, W, 3]`."""
    assert main(arguments(which, out, *more)) == 0
    return pictures_in(out)


@pytest.fixture(scope="module")
def drawn(base: pathlib.Path) -> np.ndarray:
    """The pictures of the work directory, from the noise of its training."""
    return draw(f"--workdir={base}/run", base / "drawn")


@pytest.fixture(scope="module")
def drawn_plain(base: pathlib.Path) -> np.ndarray:
    """The same from plain noise."""
    return draw(f"--workdir={base}/run", base / "drawn plain", "--start_noise=plain")


def test_the_start_shows_in_the_pictures(drawn: np.ndarray, drawn_plain: np.ndarray) -> None:
    """Else there would be nothing to compare below."""
    assert drawn.shape == (len(REQUESTS), SIZE, SIZE, 3)
    assert drawn.std() > 20
    assert min(np.abs(one - other).max() for one, other in zip(drawn, drawn_plain, strict=True)) > 5


@pytest.mark.parametrize("form", ["exported", "exported.safetensors"])
def test_an_export_is_drawn_as_its_training(
    form: str, base: pathlib.Path, tmp_path: pathlib.Path, drawn: np.ndarray, drawn_plain: np.ndarray
) -> None:
    """Its header says which noise to start from and how large the pictures are."""
    model = f"--model={base / form}"
    assert np.abs(draw(model, tmp_path / "matched") - drawn).max() <= 1
    assert np.abs(draw(model, tmp_path / "plain", "--start_noise=plain") - drawn_plain).max() <= 1
    about = json.loads((tmp_path / "matched" / "samples.json").read_text())
    assert (about["start_noise"], about["num_steps"], about["guidance_scale"]) == ("matched", 2, 2.0)


def test_an_untouched_model_is_drawn_from_plain_noise_at_its_own_size(
    base: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    matched = draw(f"--model={base}/model", tmp_path / "matched")
    plain = draw(f"--model={base}/model", tmp_path / "plain", "--start_noise=plain")
    assert matched.shape[1:3] == (16, 16)
    np.testing.assert_array_equal(matched, plain)


def test_an_untouched_single_file_is_as_large_as_its_familys_first_model(
    base: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    file = shutil.copyfile(base / "exported.safetensors", tmp_path / "untouched.safetensors")
    safetensors.numpy.save_file(safetensors.numpy.load_file(file), file, {"format": "pt"})
    config = load_model(file).config
    assert config.data.resolution == 64 * 2  # latents of 64x64, and this autoencoder halves once
    assert (config.noise.kind, config.noise.offset_strength) == ("offset", 0.0)


def test_spectral_noise_is_known_from_an_export(base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    begin(base / "model", tmp_path / "run", kind="spectral", spectrum=("1 + 0.2 / (f + 0.02) ** 2",))
    export(tmp_path / "run", tmp_path / "exported")
    assert load_model(tmp_path / "exported").config.noise.spectrum == ("1 + 0.2 / (f + 0.02) ** 2",)
    expected = draw(f"--workdir={tmp_path}/run", tmp_path / "first")
    found = draw(f"--model={tmp_path}/exported", tmp_path / "second")
    assert np.abs(found - expected).max() <= 1


def merged(model: pathlib.Path, lora: dict[str, np.ndarray], names: dict[str, str], out: pathlib.Path) -> None:
    """The model with W + α / r · up · down for W of each layer, in PyTorch's layout."""
    shutil.copytree(model, out)
    header = safetensors.safe_open(model / UNET, "np").metadata()
    weights = safetensors.numpy.load_file(out / UNET)
    for key, name in names.items():
        down, up, alpha = (lora[f"{key}.{half}"] for half in ("lora_down.weight", "lora_up.weight", "alpha"))
        weights[f"{name}.weight"] += alpha / len(down) * up @ down
    safetensors.numpy.save_file(weights, out / UNET, header)


def test_a_model_is_drawn_with_a_lora(base: pathlib.Path, tmp_path: pathlib.Path, drawn: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    names, lora = {}, {}
    for attention in ("attn1.to_q", "attn2.to_v"):
        name = f"down_blocks.0.attentions.0.transformer_blocks.0.{attention}"
        key = "lora_unet_" + name.replace(".", "_")
        inputs = 24 if attention == "attn2.to_v" else 32
        lora |= {
            f"{key}.lora_down.weight": rng.normal(size=(4, inputs)).astype(np.float32),
            f"{key}.lora_up.weight": rng.normal(size=(32, 4)).astype(np.float32),
            f"{key}.alpha": np.float32(2.0),
        }
        names[key] = name
    safetensors.numpy.save_file({key: np.asarray(array) for key, array in lora.items()}, tmp_path / "lora.safetensors")
    merged(base / "exported", lora, names, tmp_path / "merged")
    found = draw(f"--model={base}/exported", tmp_path / "with", f"--lora={tmp_path}/lora.safetensors")
    assert np.abs(found - drawn).max() > 5
    assert np.abs(found - draw(f"--model={tmp_path}/merged", tmp_path / "of merged")).max() <= 1


def test_a_loras_own_noise_process_and_size_go_before_its_bases(base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    down, up = np.ones((4, 32), np.float32), np.ones((32, 4), np.float32)

    def opened(**header: str) -> ConfigDict:
        file = tmp_path / "lora.safetensors"
        safetensors.numpy.save_file({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}, file, header)
        return load_model(base / "exported", lora=str(file)).config

    noise, size = {"offsetjax.noise": json.dumps({"offset_strength": 0.3})}, {"modelspec.resolution": "16x16"}
    flow = opened(**noise, **size, **{"modelspec.prediction_type": "flow", "ss_discrete_flow_shift": "3.0"})
    assert (flow.schedule.process, flow.schedule.shift) == ("flow", 3.0)
    assert (flow.noise.offset_strength, flow.data.resolution) == (0.3, 16)
    as_base = opened(**noise, **size, **{"modelspec.prediction_type": "epsilon"})
    assert (as_base.schedule.process, as_base.noise.offset_strength) == ("variance_preserving", 0.3)
    others = opened(**size)
    assert (others.noise.offset_strength, others.data.resolution) == (0.5, SIZE)
    with pytest.raises(UserError, match=r"lora\.safetensors: what its header says of its noise cannot be read"):
        opened(**{"offsetjax.noise": json.dumps({"kind": "loud"})})


def test_one_device_draws_what_eight_draw(
    base: pathlib.Path, tmp_path: pathlib.Path, drawn: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with quick_compilation(tmp_path_factory.getbasetemp()) as environment:
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        command = [sys.executable, "-m", "offsetjax", *arguments(f"--model={base}/exported", tmp_path / "out")]
        subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=True)
    assert jax.device_count() == 8
    assert np.abs(pictures_in(tmp_path / "out") - drawn).max() <= 1


def test_eight_devices_hold_an_eighth_of_the_weights_each_and_draw_an_eighth_of_the_pictures(
    base: pathlib.Path,
) -> None:
    model = load_model(base / "exported")
    leaves = jax.tree.leaves(model.frozen)
    stored = {
        device: sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards if shard.device == device)
        for device in jax.devices()
    }
    total = sum(leaf.nbytes for leaf in leaves)
    assert len(stored) == 8 and max(stored.values()) < 0.16 * total, (stored, total)

    model.config.sample.num_steps = 2
    keys, shifts = jax.random.split(jax.random.key(0), 8), np.zeros(8, np.float32)
    ids, negative = model.pipeline.tokenize(["a"] * 8), model.pipeline.tokens("").input_ids
    draw = make_sampler(model.pipeline, model.config.sample, model.config.data.resolution, 0, model.mesh).draw
    program = draw.lower(model.params, model.frozen, ids, negative, keys, shifts).compile().as_text()
    # Of the program of one device: a picture of the autoencoder's, two of the denoiser's, with and without the prompt.
    assert set(re.findall(r"= f32\[(\d+),\d+,\d+,\d+\]\S* convolution\(", program)) == {"1", "2"}


def test_two_models_are_drawn_from_the_same_seeds_side_by_side(
    base: pathlib.Path, tmp_path: pathlib.Path, drawn: np.ndarray, drawn_plain: np.ndarray
) -> None:
    """The weights are the same and the untouched model's noise is plain: it draws what the trained one does of that."""
    assert main(arguments(f"--workdir={base}/run", tmp_path / "out", f"--compare={base}/model")) == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"compare.png", "compare.json"}
    about = json.loads((tmp_path / "out" / "compare.json").read_text())
    records = about["records"]
    assert [(record["prompt"], record["seed"]) for record in records] == REQUESTS
    for record, before, after in zip(records, drawn_plain, drawn, strict=True):
        assert record["before"] == pytest.approx(before.mean() / 255, abs=1 / 255)
        assert record["after"] == pytest.approx(after.mean() / 255, abs=1 / 255)
    assert about["before"]["num_steps"] == about["after"]["num_steps"] == 2
    pairs = [
        [Picture(*request, image.astype(np.uint8)) for request, image in zip(REQUESTS, images, strict=True)]
        for images in (drawn_plain, drawn)
    ]
    with Image.open(tmp_path / "out" / "compare.png") as found:
        assert np.abs(np.asarray(found).astype(int) - np.asarray(side_by_side(*pairs))).mean() < 1


@pytest.mark.parametrize("size", [16, 64, 512])
def test_before_and_after_stand_side_by_side_with_text_that_has_room(size: int) -> None:
    """Under each picture, no wider than it; a long prompt continues in the next line."""
    rng = np.random.default_rng(0)
    prompts = ("a " * size, "")
    before, after = (
        [Picture(prompt, 0, rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for prompt in prompts]
        for _ in range(2)
    )
    canvas = np.asarray(side_by_side(before, after)).astype(int)
    background = canvas[0, 0]
    scale = 1 if size == 512 else -(-160 // size)
    places = []
    for picture in (*before, *after):
        enlarged = picture.image.repeat(scale, 0).repeat(scale, 1)
        rows, columns = np.nonzero((canvas == enlarged[0, 0]).all(-1))
        side = len(enlarged)
        [place] = [
            (y, x)
            for y, x in zip(rows.tolist(), columns.tolist(), strict=True)
            if np.array_equal(canvas[y : y + side, x : x + side], enlarged)
        ]
        places.append(place)
    (first, second), (third, fourth) = places[:2], places[2:]
    assert first[0] == third[0] < second[0] == fourth[0]
    assert first[1] == second[1] < third[1] == fourth[1]
    side, gap = size * scale, third[1] - first[1] - size * scale
    for y, x in places:
        assert (canvas[y + side : y + side + 16, x : x + side] != background).any(), "no text under a picture"
    between = canvas[second[0] + side :, first[1] + side : first[1] + side + gap]
    assert gap > 0 and (between == background).all(), "the text runs into the next"
    assert (canvas[:, -gap:] == background).all(), "the prompt runs out of the picture"
