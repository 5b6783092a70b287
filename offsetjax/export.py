"""A checkpoint to a model that PyTorch diffusers loads, written under a temporary name and renamed."""

import dataclasses
import datetime
import json
import os

import numpy as np
import safetensors.numpy
from etils import epath
from ml_collections import ConfigDict

from offsetjax.errors import UserError
from offsetjax.formats import diffusers as files
from offsetjax.model_card import SPECTRUM_FILE, matched_sampler, model_card
from offsetjax.models.pipeline import TRAINED, Pipeline, save_frozen, save_part
from offsetjax.objective import training_noise
from offsetjax.workdir import Trained, load_trained


def noise_metadata(pipeline: Pipeline, config: ConfigDict, step: int) -> dict[str, str]:
    """The header's `modelspec.*` (the field's standard) and `ss_*` (kohya's names): how the model was trained."""
    side = str(config.data.resolution)
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": _architecture(config),
        "modelspec.implementation": "diffusers",
        "modelspec.title": "offsetjax",
        "modelspec.date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": {"epsilon": "epsilon", "v_prediction": "v"}[config.schedule.prediction_type],
        "offsetjax.noise": json.dumps({key: value for key, value in config.noise.items() if key != "calibration"}),
        **_noise_names(pipeline, config),
        "ss_zero_terminal_snr": str(config.schedule.zero_terminal_snr),
        "ss_v_parameterization": str(config.schedule.prediction_type == "v_prediction"),
        "ss_min_snr_gamma": repr(config.loss.min_snr_gamma or None),
        "ss_caption_dropout_rate": repr(config.encode.caption_dropout),
        "ss_learning_rate": repr(config.optimizer.learning_rate),
        "ss_max_train_steps": str(config.train.steps),
        "ss_steps": str(step),
        "ss_seed": str(config.seed),
        "ss_resolution": f"({side}, {side})",
    }


def _noise_names(pipeline: Pipeline, config: ConfigDict) -> dict[str, str]:
    """The noise by kohya's names, which know a fixed offset only, in effect at this size; those not in use are None."""
    noise, side = config.noise, config.data.resolution // pipeline.vae.downscale
    strength = float(f"{training_noise(pipeline, config).strengths_at(side * side).max():.6g}")
    return {
        "ss_noise_offset": repr(None if noise.kind == "adjusted" else strength),
        "ss_noise_offset_random_strength": str(noise.random_strength),
        "ss_adaptive_noise_scale": repr(noise.adaptive_scale or None),
        "ss_multires_noise_iterations": repr(noise.pyramid_levels or None),
        "ss_multires_noise_discount": repr(noise.pyramid_discount or None),
        "ss_ip_noise_gamma": repr(noise.input_perturbation or None),
    }


def _architecture(config: ConfigDict) -> str:
    if config.model.unet.cross_attention_dim != 1024:  # the width of OpenCLIP ViT-H, which 2.x has
        return "stable-diffusion-v1"
    return {"v_prediction": "stable-diffusion-v2-768-v", "epsilon": "stable-diffusion-v2-512"}[
        config.schedule.prediction_type
    ]


def export(
    workdir: epath.PathLike,
    out: epath.PathLike,
    *,
    step: int | None = None,
    params: str | None = None,
    dtype: str = "float32",
) -> None:
    """Writes a diffusers directory: what PyTorch's `StableDiffusionPipeline.from_pretrained` loads.

    An autoencoder's training gives the `vae/` alone, which `model.pretrained` accepts.

    Raises:
        UserError: `out` exists, or the checkpoint cannot be read.
    """
    out = epath.Path(out)
    if out.exists():
        raise UserError(f"export: {out} exists; give another --out, or remove it")
    trained = load_trained(workdir, step, params)
    temporary = out.parent / f".{out.name}.{os.getpid()}"
    try:
        _write(temporary, trained, dtype)
        temporary.rename(out)
    finally:
        if temporary.exists():
            temporary.rmtree()


def _write(out: epath.Path, trained: Trained, dtype: str) -> None:
    config, pipeline, part = trained.config, trained.pipeline, TRAINED[trained.config.task]
    is_diffusion = config.task == "diffusion"
    metadata = noise_metadata(pipeline, config, trained.step) if is_diffusion else {}
    model = getattr(pipeline, part)
    if is_diffusion:  # the size that a pipeline draws unless told otherwise is that of training
        size = config.data.resolution // pipeline.vae.downscale
        model = dataclasses.replace(model, config={**model.config, "sample_size": size})
    save_part(out, part, model, trained.params, dtype=dtype, **metadata)
    save_frozen(out, pipeline, trained.frozen, dtype=dtype)
    if is_diffusion:
        scheduler = files.scheduler_config(
            config.schedule.to_dict(), matched_sampler(pipeline, config), config.sample.spacing
        )
        files.write_scheduler(out, scheduler)
        (out / "README.md").write_text(model_card(pipeline, config, trained.step))
        write_spectrum(out, pipeline, config)
        files.write_index(out, scheduler["_class_name"])


def write_spectrum(out: epath.Path, pipeline: Pipeline, config: ConfigDict) -> None:
    """The deviation of each mode of coloured noise, which the card's recipe reads; an offset comes on top."""
    noise, size = training_noise(pipeline, config), config.data.resolution // pipeline.vae.downscale
    if noise.spectrum is None:
        return
    root = np.ascontiguousarray(np.sqrt(noise.spectrum(size, size)), np.float32)
    (out / SPECTRUM_FILE).parent.mkdir()
    (out / SPECTRUM_FILE).write_bytes(safetensors.numpy.save({"root_spectrum": root}))
