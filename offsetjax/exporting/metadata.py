"""What an exported file's header says: `modelspec.*`, the field's standard, and `ss_*`, kohya's names.

https://github.com/Stability-AI/ModelSpec
"""

import datetime
import json

from ml_collections import ConfigDict

from offsetjax.diffusion.flow import SHIFT_METADATA, shift_metadata
from offsetjax.models.pipeline import Pipeline, grid_shift
from offsetjax.sampling.reach import start_in_words


def header(pipeline: Pipeline, config: ConfigDict, step: int, form: str, title: str) -> dict[str, str]:
    """The header's `modelspec.*` (the field's standard) and `ss_*` (kohya's names): how the model was trained.

    Args:
        form: of the export: diffusers, single_file or lora.
        title: the file's name.
    """
    side = str(config.data.resolution)
    optimizer, files = config.optimizer, pipeline.family.files
    text_rate = optimizer.text_encoder_learning_rate or optimizer.learning_rate
    described = pipeline.noising.process.metadata()
    if SHIFT_METADATA in described:
        _, height, width = pipeline.latent_shape(config.data.resolution)
        drawn = grid_shift(pipeline, config.sample.shift, height * width)
        described |= shift_metadata(config.schedule.to_dict(), drawn)
    architecture = files.architecture(described.get("modelspec.prediction_type", ""))
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture + ("/lora" if form == "lora" else ""),
        "modelspec.implementation": files.original if form == "single_file" else "diffusers",
        "modelspec.title": title,
        "modelspec.date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "modelspec.resolution": f"{side}x{side}",
        **described,
        "offsetjax.noise": json.dumps({key: value for key, value in config.noise.items() if key != "calibration"}),
        "offsetjax.start": start_in_words(pipeline, config.sample, config.data.resolution, step),
        **_noise_names(pipeline, config.data.resolution, step),
        "ss_min_snr_gamma": repr(config.loss.min_snr_gamma or None),
        "ss_caption_dropout_rate": repr(config.encode.caption_dropout),
        "ss_learning_rate": repr(optimizer.learning_rate),
        "ss_unet_lr": repr(optimizer.learning_rate),
        "ss_text_encoder_lr": repr(text_rate if config.train.text_encoders else None),
        "ss_max_train_steps": str(config.train.steps),
        "ss_steps": str(step),
        "ss_seed": str(config.seed),
        "ss_resolution": f"({side}, {side})",
    }


def _noise_names(pipeline: Pipeline, resolution: int, step: int) -> dict[str, str]:
    """The noise by kohya's names, which know a fixed offset only, in effect at this size; those not in use are None.

    The strength is what the step has left of it: what a start needs.
    """
    noise, (_, height, width) = pipeline.noising.settings, pipeline.latent_shape(resolution)
    left = pipeline.noising.noise(step)
    strength = float(f"{left.strengths_at(height, width).max():.6g}")
    names = {
        "ss_noise_offset": repr(None if noise.kind == "adjusted" else strength),
        "ss_noise_offset_random_strength": str(noise.random_strength),
        "ss_adaptive_noise_scale": repr(noise.adaptive_scale or None),
        "ss_multires_noise_iterations": repr(noise.pyramid_levels or None),
        "ss_multires_noise_discount": repr(noise.pyramid_discount or None),
    }
    if left.is_plain:  # by `noise.anneal` too
        names |= dict.fromkeys(names, "None") | {"ss_noise_offset": "0.0", "ss_noise_offset_random_strength": "False"}
    return names | {"ss_ip_noise_gamma": repr(noise.input_perturbation or None)}
