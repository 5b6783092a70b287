"""An SDXL model with both text encoders, trained by adapters: exported, loaded by PyTorch, started from again."""

import math
import pathlib
from collections.abc import Callable
from typing import Any

import diffusers
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import torch
from jaxtyping import PyTree
from ml_collections import ConfigDict

from offsetjax.config import default_config
from offsetjax.errors import UserError
from offsetjax.exporting.export import export
from offsetjax.models.trained import Trained, load_model, load_trained
from offsetjax.sampling.sample import pixel_sampler
from offsetjax.train import train
from tests import families, tiny

PROMPTS = ("a black square", "a green hill")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("lora")
    families.save_tiny_xl(folder / "model")
    tiny.build_data(folder)
    return folder


def lora_config(base: pathlib.Path, **changes: Any) -> ConfigDict:
    config = default_config()
    config.data.path, config.data.resolution = str(base / "data"), tiny.RESOLUTION
    config.model.pretrained, config.model.dtype = str(base / "model"), "float32"
    config.train.update(steps=3, global_batch_size=8, log_every_steps=1)
    config.noise.offset_strength = 0.1
    if "lora__pretrained" not in changes:  # which has a rank and an alpha of its own
        config.lora.update(rank=4, alpha=2.0)
    config.train.text_encoders = True
    config.optimizer.update(learning_rate=1e-2, text_encoder_learning_rate=5e-3, warmup_steps=1, ema_decay=0.5)
    config.sample.every_steps = 0
    config.update_from_flattened_dict({path.replace("__", "."): value for path, value in changes.items()})
    return config


@pytest.fixture(scope="module")
def workdir(base: pathlib.Path) -> pathlib.Path:
    with tiny.quick_compilation(base):
        train(lora_config(base), base / "run")
    return base / "run"


@pytest.fixture(scope="module")
def draw(base: pathlib.Path) -> Callable[[Trained], tuple[np.ndarray, np.ndarray]]:
    """Our pictures of a model from fixed starts, and the starts."""

    def pictures(model: Trained) -> tuple[np.ndarray, np.ndarray]:
        config = model.config.copy_and_resolve_references()
        config.sample.update(num_steps=5, guidance_scale=3.0)
        start = np.array(tiny.start_of(model.pipeline, config, jax.random.split(jax.random.key(5), len(PROMPTS))))
        ids, negative = model.pipeline.tokenize(PROMPTS), model.pipeline.tokens("").input_ids
        with tiny.quick_compilation(base):
            drawn = jax.jit(pixel_sampler(model.pipeline, config.sample, config.data.resolution))
            images = drawn(model.params, model.frozen, ids, negative, start)
        return np.transpose(images, (0, 2, 3, 1)), start

    return pictures


def in_pytorch(pipeline: diffusers.StableDiffusionXLPipeline, start: np.ndarray) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    size = {"height": tiny.RESOLUTION, "width": tiny.RESOLUTION}
    latents = torch.from_numpy(start)
    return pipeline(
        list(PROMPTS), latents=latents, num_inference_steps=5, guidance_scale=3.0, output_type="np", **size
    ).images


def load_torch(folder: pathlib.Path) -> diffusers.StableDiffusionXLPipeline:
    return diffusers.StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)


def flat(tree: PyTree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def test_adapters_of_all_three_networks_learn_and_the_rest_does_not(workdir: pathlib.Path) -> None:
    model = load_trained(workdir)
    assert set(model.params) == {"unet", "text_encoder", "text_encoder_2"}
    ups = {name: leaf for name, leaf in flat(model.params).items() if name.endswith("/up")}
    # SDXL reads the first text encoder before its last layer, which therefore has nothing to learn.
    idle = {name for name in ups if name.startswith("text_encoder/text_model/encoder/layers/1/")}
    assert len(ups) > 20 and len(idle) == 4
    assert {name for name, leaf in ups.items() if not np.abs(leaf).max()} == idle
    before, after = (
        safetensors.numpy.load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
        for folder in (workdir.parent / "model", workdir / "frozen")
    )
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_the_optimizer_holds_moments_of_adapters_alone(workdir: pathlib.Path) -> None:
    state = workdir / "checkpoints" / "3" / "state"
    metadata = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).metadata(state).item_metadata.tree
    sizes = {
        name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape"))
        for name, tree in metadata.items()
    }
    adapters = sum(leaf.size for leaf in jax.tree.leaves(load_trained(workdir).params))
    assert sizes["params"] == sizes["ema_params"] == adapters
    assert 2 * adapters <= sizes["opt_state"] < 2 * adapters + 20


@pytest.mark.parametrize("keys", ["kohya", "diffusers"])
def test_pytorch_draws_our_picture_with_the_exported_lora(
    keys: str, base: pathlib.Path, workdir: pathlib.Path, draw: Callable, tmp_path: pathlib.Path
) -> None:
    export(workdir, tmp_path / "lora.safetensors", form="lora", lora_keys=keys)
    ours, start = draw(load_trained(workdir))
    plain = in_pytorch(load_torch(base / "model"), start)
    pipeline = load_torch(base / "model")
    pipeline.load_lora_weights(tmp_path / "lora.safetensors")
    theirs = in_pytorch(pipeline, start)
    assert np.abs(ours - plain).max() > 0.02, "the LoRA changes nothing: nothing is compared"
    assert np.abs(ours - theirs).max() < 1e-4

    model = load_model(base / "model", lora=str(tmp_path / "lora.safetensors"))
    model.config.noise.offset_strength = 0.1
    again, same_start = draw(model)
    np.testing.assert_array_equal(same_start, start)
    assert np.abs(ours - again).max() < 1e-4


def test_merged_exports_draw_the_same_picture(workdir: pathlib.Path, draw: Callable, tmp_path: pathlib.Path) -> None:
    export(workdir, tmp_path / "model")
    ours, start = draw(load_trained(workdir))
    assert np.abs(ours - in_pytorch(load_torch(tmp_path / "model"), start)).max() < 1e-4
    # What the header says is enough to start from the noise of the training.
    again, same_start = draw(load_model(tmp_path / "model"))
    np.testing.assert_array_equal(same_start, start)
    assert np.abs(ours - again).max() < 1e-4


def test_a_training_begins_where_a_lora_ended(
    base: pathlib.Path, workdir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Its rank, alpha and layers are read from the file; without the file, the run resumes all the same."""
    export(workdir, tmp_path / "lora.safetensors", form="lora", params="raw")
    config = lora_config(base, lora__pretrained=str(tmp_path / "lora.safetensors"))
    config.train.steps = 1
    config.optimizer.learning_rate, config.optimizer.text_encoder_learning_rate = 1e-9, 1e-9
    with tiny.quick_compilation(base):
        train(config, tmp_path / "run")
        resolved = load_trained(tmp_path / "run")
        assert (resolved.config.lora.rank, resolved.config.lora.alpha) == (4, 2.0)
        expected, found = flat(load_trained(workdir, which="raw").params), flat(resolved.params)
        assert expected.keys() == found.keys()
        for name, leaf in expected.items():
            np.testing.assert_allclose(found[name], leaf, atol=1e-6, err_msg=name)
        (tmp_path / "lora.safetensors").unlink()
        config.train.steps = 2
        train(config, tmp_path / "run")
    assert load_trained(tmp_path / "run").step == 2


def test_a_lora_of_text_encoders_is_refused_where_they_are_frozen(
    base: pathlib.Path, workdir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    export(workdir, tmp_path / "lora.safetensors", form="lora")
    config = lora_config(base, lora__pretrained=str(tmp_path / "lora.safetensors"))
    config.train.text_encoders, config.optimizer.text_encoder_learning_rate = False, 0.0
    with pytest.raises(UserError, match=r"adapts text_encoder, which is frozen; set train\.text_encoders = True"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_frozen_weights_are_held_in_bfloat16(base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = lora_config(base, model__dtype="bfloat16", train__steps=1)
    with tiny.quick_compilation(base):
        train(config, tmp_path / "run")
    model = load_trained(tmp_path / "run")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model.params)} == {"float32"}
    kinds = {part: {str(leaf.dtype) for leaf in jax.tree.leaves(tree)} for part, tree in model.frozen.items()}
    assert kinds == {part: {"bfloat16"} for part in ("unet", "text_encoder", "text_encoder_2")} | {"vae": {"float32"}}
