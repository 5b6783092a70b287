"""A checkpoint to a model that PyTorch diffusers loads, written under a temporary name and renamed."""

import dataclasses
import datetime
import os

from etils import epath
from ml_collections import ConfigDict

from offsetjax.errors import UserError
from offsetjax.formats import diffusers as files
from offsetjax.models.pipeline import TRAINED, save_frozen, save_part
from offsetjax.workdir import Trained, load_trained


def noise_metadata(config: ConfigDict, step: int) -> dict[str, str]:
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
        "ss_noise_offset": repr(config.noise.offset_strength),
        "ss_v_parameterization": str(config.schedule.prediction_type == "v_prediction"),
        "ss_min_snr_gamma": repr(config.loss.min_snr_gamma or None),
        "ss_caption_dropout_rate": repr(config.encode.caption_dropout),
        "ss_learning_rate": repr(config.optimizer.learning_rate),
        "ss_max_train_steps": str(config.train.steps),
        "ss_steps": str(step),
        "ss_seed": str(config.seed),
        "ss_resolution": f"({side}, {side})",
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
    metadata = noise_metadata(config, trained.step) if is_diffusion else {}
    model = getattr(pipeline, part)
    if is_diffusion:  # the size that a pipeline draws unless told otherwise is that of training
        size = config.data.resolution // pipeline.vae.downscale
        model = dataclasses.replace(model, config={**model.config, "sample_size": size})
    save_part(out, part, model, trained.params, dtype=dtype, **metadata)
    save_frozen(out, pipeline, trained.frozen, dtype=dtype)
    if is_diffusion:
        files.write_scheduler(out, config.schedule.to_dict(), config.sample.spacing)
        files.write_index(out)
