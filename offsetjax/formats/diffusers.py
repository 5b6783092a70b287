"""The diffusers directory: a folder for each part, with `config.json` and `diffusion_pytorch_model.safetensors`."""

import json
from collections.abc import Mapping
from typing import Any

import diffusers
import ml_dtypes
import numpy as np
import safetensors.numpy
from etils import epath
from safetensors import SafetensorError

from offsetjax.errors import UserError

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def read_config(directory: epath.PathLike, part: str) -> dict[str, Any]:
    """The `config.json` (`scheduler_config.json` for the scheduler) of a part.

    Raises:
        UserError: it is missing or not JSON.
    """
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    file = epath.Path(directory) / part / name
    if not file.exists():
        raise UserError(
            f"model.pretrained: {file} is missing; give a whole diffusers directory, or add to model.from_scratch"
        )
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"model.pretrained: {file} is not JSON ({error}); fetch it again") from error


def read_tensors(directory: epath.PathLike, part: str) -> dict[str, np.ndarray]:
    """Every tensor of a part, by its PyTorch name.

    Raises:
        UserError: the file is missing, truncated or not safetensors.
    """
    folder = epath.Path(directory) / part
    file = folder / WEIGHTS[part]
    if not file.exists():
        pickled = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".ckpt", ".pt")] if folder.exists() else []
        hint = f"; {pickled[0]} is a pickle, which can run code: convert it to safetensors" if pickled else ""
        raise UserError(f"model.pretrained: {file} is missing{hint}")
    try:
        return safetensors.numpy.load(file.read_bytes())
    except SafetensorError as error:
        raise UserError(f"model.pretrained: {file} is damaged ({error}); fetch it again") from error


def write_part(
    directory: epath.PathLike,
    part: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    dtype: str = "float32",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes one part's configuration and weights, in `dtype`.

    Args:
        metadata: goes into the header of the safetensors file.
    """
    folder = epath.Path(directory) / part
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
    converted = {name: np.ascontiguousarray(tensor.astype(DTYPES[dtype])) for name, tensor in tensors.items()}
    (folder / WEIGHTS[part]).write_bytes(safetensors.numpy.save(converted, {"format": "pt", **(metadata or {})}))


# The PyTorch scheduler of each of our samplers, and what makes it follow the same table of coefficients.
_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_small"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
}


def scheduler_config(schedule: Mapping[str, Any], sampler: str, spacing: str) -> dict[str, Any]:
    """`scheduler_config.json` of PyTorch diffusers' counterpart of `sampler`."""
    name, settings = _SCHEDULERS[sampler]
    return {
        "_class_name": name,
        "_diffusers_version": diffusers.__version__,
        **{key: value for key, value in schedule.items() if key != "zero_terminal_snr"},
        "rescale_betas_zero_snr": schedule["zero_terminal_snr"],
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "timestep_spacing": spacing,
        **settings,
    }


def write_scheduler(directory: epath.PathLike, config: Mapping[str, Any]) -> None:
    """Writes the scheduler's configuration, and with it what a PyTorch pipeline samples by."""
    folder = epath.Path(directory) / "scheduler"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scheduler_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_index(directory: epath.PathLike, scheduler: str) -> None:
    """Writes `model_index.json`: which class loads which folder; `scheduler` is that of the scheduler."""
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (epath.Path(directory) / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
