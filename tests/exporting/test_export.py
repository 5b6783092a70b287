"""A training's export: PyTorch's pipeline loads it and draws our pictures; a failed export leaves nothing."""

import json
import pathlib
import re
from typing import Any

import diffusers
import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from offsetjax.config import default_config, validate
from offsetjax.diffusion.flow import Flow, shift_metadata, stored_scheduler, stored_shifts
from offsetjax.diffusion.process import recognised
from offsetjax.errors import UserError
from offsetjax.exporting.export import export
from offsetjax.formats import diffusers as files
from offsetjax.models.pipeline import grid_shift
from offsetjax.models.resolve import resolve
from offsetjax.models.trained import Trained, load_model, load_trained
from offsetjax.sampling.sample import pixel_sampler
from offsetjax.train import train
from tests import tiny, torch_models

PROMPTS = ("a black square", "a green hill")
NAMES = {"epsilon": "epsilon", "v_prediction": "v"}


def pretrained_epsilon(model: pathlib.Path, data: pathlib.Path) -> Any:
    """ε prediction, fine-tuned from a PyTorch pipeline, sampled with trailing time steps."""
    torch_models.save_pipeline(model)
    config = tiny.tiny_config(data)
    default = default_config()
    for part in ("unet", "vae", "text_encoder"):
        config.model[part] = default.model[part]
    config.model.pretrained = str(model)
    config.noise.offset_strength, config.sample.spacing = 0.1, "trailing"
    return config


def own_velocity(_: pathlib.Path, data: pathlib.Path) -> Any:
    """v prediction, all parts begun here, standardised latents, sampled with leading time steps."""
    config = tiny.tiny_config(data)
    config.schedule.prediction_type = "v_prediction"
    config.model.vae.scaling_factor = 0.0
    config.model.unet.sample_size = 32  # not that of the training: pictures are smaller
    config.noise.offset_strength, config.sample.spacing = 0.1, "leading"
    return config


def own_flow(_: pathlib.Path, data: pathlib.Path) -> Any:
    """A flow whose shift goes by the size, and is 2 at its own; all parts begun here, sampled with DPM-Solver++."""
    config = tiny.tiny_config(data, schedule__process="flow", sample__sampler="dpmpp_2m")
    config.schedule.update(shift_rule="resolution", shift_resolution=tiny.RESOLUTION // 2)
    config.timesteps.density, config.sample.num_steps = "logit_normal", 10
    return config


@pytest.fixture(scope="module", params=[pretrained_epsilon, own_velocity, own_flow])
def workdir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("export")
    config = request.param(folder / "model", tiny.build_data(folder))
    config.train.steps = config.checkpoint.every_steps = 3
    train(config, folder / "workdir")
    return folder / "workdir"


@pytest.fixture(scope="module")
def trained(workdir: pathlib.Path) -> Trained:
    return load_trained(workdir)


@pytest.fixture(scope="module")
def exported(workdir: pathlib.Path) -> pathlib.Path:
    export(workdir, workdir / "exported")
    return workdir / "exported"


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_pytorch_draws_our_pictures(spacing: str, trained: Trained, exported: pathlib.Path) -> None:
    config = trained.config.copy_and_resolve_references()
    is_flow = config.schedule.process == "flow"
    if is_flow and spacing == "leading":
        pytest.skip("a flow's samplers begin at t = 1")
    exported_spacing = config.sample.spacing
    config.sample.update(num_steps=10, guidance_scale=3.0, spacing=spacing)
    keys = jax.random.split(jax.random.key(5), len(PROMPTS))
    start = np.array(tiny.start_of(trained.pipeline, config, keys))
    input_ids, negative_ids = trained.pipeline.tokenize(PROMPTS), trained.pipeline.tokens("").input_ids
    draw = jax.jit(pixel_sampler(trained.pipeline, config.sample, config.data.resolution))
    ours = np.transpose(draw(trained.params, trained.frozen, input_ids, negative_ids, start), (0, 2, 3, 1))

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(exported, safety_checker=None)
    assert type(pipeline.tokenizer) is transformers.CLIPTokenizer
    if is_flow:
        assert pipeline.scheduler.config.prediction_type == "flow_prediction"
        assert pipeline.scheduler.config.flow_shift == 2.0
    else:
        assert pipeline.scheduler.config.timestep_spacing == exported_spacing
        assert pipeline.scheduler.config.prediction_type == config.schedule.prediction_type
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing=spacing)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        list(PROMPTS), latents=torch.from_numpy(start), num_inference_steps=10, guidance_scale=3.0, output_type="np"
    ).images

    assert ours.shape == theirs.shape == (2, tiny.RESOLUTION, tiny.RESOLUTION, 3)
    assert ours.std() > 0.05, "the pictures are flat: nothing is compared"
    assert np.abs(ours[0] - ours[1]).max() > 0.05
    difference = np.abs(ours - theirs)
    assert difference.max() <= 1 / 255 and difference.mean() <= 1e-3, (difference.max(), difference.mean())


def test_the_header_says_how_the_model_was_trained(trained: Trained, exported: pathlib.Path) -> None:
    config = trained.config
    with safetensors.safe_open(exported / "unet" / "diffusion_pytorch_model.safetensors", "np") as file:
        header = file.metadata()
    assert header["modelspec.sai_model_spec"] == "1.0.0"
    is_flow = config.schedule.process == "flow"
    assert header["modelspec.prediction_type"] == ("flow" if is_flow else NAMES[config.schedule.prediction_type])
    assert header["modelspec.resolution"] == f"{tiny.RESOLUTION}x{tiny.RESOLUTION}"
    assert float(header["ss_noise_offset"]) == 0.1
    if is_flow:
        assert float(header["ss_discrete_flow_shift"]) == 2.0
    else:
        assert header["ss_v_parameterization"] == str(config.schedule.prediction_type == "v_prediction")
    assert int(header["ss_steps"]) == 3
    assert header["format"] == "pt"


def test_a_checkpoint_that_is_a_flow_is_recognised(trained: Trained, exported: pathlib.Path) -> None:
    process, shift = trained.config.schedule.process, trained.config.schedule.shift
    config = default_config()
    config.model.pretrained = str(exported)
    found = resolve(config)
    assert (found.schedule.process, found.schedule.shift) == (process, shift)
    if process == "flow":
        # The scheduler has the shift of one size; the header has the rule, which another training goes on with.
        assert (found.schedule.shift_rule, found.schedule.shift_resolution) == ("resolution", tiny.RESOLUTION // 2)
        model = load_model(exported)
        shifts = [grid_shift(model.pipeline, model.config.sample.shift, side**2) for side in (8, 16)]
        assert shifts == [2.0, 4.0]
        config.schedule.update(shift_rule="tokens")
        assert resolve(config).schedule.shift == 1.0
        config.schedule.update(shift_rule="fixed")
        config.schedule.process = "variance_preserving"
        with pytest.raises(UserError, match=r"schedule.process = 'variance_preserving', but .* has 'flow'"):
            resolve(config)
        return
    # What is trained as something else becomes a flow where the config says so.
    config.schedule.update(process="flow", shift=3.0)
    converted = resolve(config)
    validate(converted)
    assert (converted.schedule.process, converted.schedule.shift) == ("flow", 3.0)


def test_a_single_files_header_says_that_it_is_a_flow() -> None:
    said = {**Flow(shift=2.5).metadata(), **shift_metadata(OWN, 2.5)}
    assert recognised(stored_scheduler(said)) == {"process": "flow", "num_train_timesteps": 1000, "shift": 2.5}
    assert stored_scheduler({"modelspec.prediction_type": "v"}) is None
    assert recognised({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})["shift"] == 3.0


OWN = {"shift": 1.5, "shift_rule": "resolution", "shift_resolution": 512}


def test_a_header_has_the_rule_of_a_shift_beside_that_of_drawing() -> None:
    assert stored_shifts(shift_metadata({**OWN, "beta_end": 0.012}, 3.0)) == OWN
    assert shift_metadata(OWN, 3.0)["ss_discrete_flow_shift"] == "3.0"
    for text in ("", "[]", "{", "{}", '{"shift": "2"}', json.dumps({**OWN, "shift": 0.0}), "9" * 5000):
        assert stored_shifts({"offsetjax.schedule": text}) == {}
    for wrong in ({"shift_rule": "loud"}, {"shift_resolution": 0}, {"shift_resolution": -1}, {"shift": True}):
        assert stored_shifts({"offsetjax.schedule": json.dumps({**OWN, **wrong})}) == {}


FLUX = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": True}


def test_a_dynamic_shift_is_read_as_the_rule_that_it_is() -> None:
    by_tokens = {**FLUX, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
    assert recognised(by_tokens) == {"process": "flow", "shift_rule": "tokens"}
    for wrong in ({**FLUX, "max_shift": 1.3}, {**FLUX, "time_shift_type": "linear"}, {**FLUX, "invert_sigmas": True}):
        with pytest.raises(UserError, match=r"the scheduler of a flow has (max_shift|time_shift_type|invert_sigmas) ="):
            recognised(wrong)
    with pytest.raises(UserError, match=r"has prediction_type = 'epsilon'"):
        recognised({"use_flow_sigmas": True, "prediction_type": "epsilon"})


def test_the_card_of_a_flow_says_its_shift_and_what_a_plain_start_does(
    trained: Trained, exported: pathlib.Path
) -> None:
    card = (exported / "README.md").read_text()
    matched, plain = map(
        int, re.search(r"return (\d+)% from the noise of training, and (\d+)% from plain", card).groups()
    )
    with safetensors.safe_open(exported / "unet" / "diffusion_pytorch_model.safetensors", "np") as file:
        header = file.metadata()
    assert f"return {matched}% from the noise of training, and {plain}% from plain noise" in header["offsetjax.start"]
    if trained.config.schedule.process != "flow":
        assert "ModelSamplingSD3" not in card
        return
    assert "ModelSamplingSD3" in card and "a shift of 2." in card
    left = (1 + 0.1**2 * 64) ** -0.5  # latents of 8x8
    assert plain / matched == pytest.approx(left, abs=0.02)


def test_a_pipeline_draws_at_the_resolution_of_training_by_itself(exported: pathlib.Path) -> None:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(exported, safety_checker=None)
    assert pipeline.unet.config.sample_size * pipeline.vae_scale_factor == tiny.RESOLUTION


def test_the_average_or_the_raw_parameters_are_written(
    workdir: pathlib.Path, exported: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    assert load_trained(workdir).which == "ema"
    export(workdir, tmp_path / "raw", params="raw")
    raw, average = (
        safetensors.numpy.load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")["conv_out.weight"]
        for folder in (tmp_path / "raw", exported)
    )
    assert np.abs(raw - average).max() > 0


def test_an_existing_folder_is_not_touched(workdir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note.txt").write_text("mine")
    with pytest.raises(UserError, match=r"out exists; give another --out"):
        export(workdir, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "note.txt"]
    assert (tmp_path / "out" / "note.txt").read_text() == "mine"


def test_a_failed_export_leaves_nothing(
    workdir: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_index", full)  # the last file that is written
    with pytest.raises(OSError, match="No space left"):
        export(workdir, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
