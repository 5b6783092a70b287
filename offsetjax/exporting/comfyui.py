"""The noise of a model as one file of ComfyUI nodes, `comfyui_node.py.txt` with the model's parameters put in.

The template is no module of this package: it needs PyTorch, and runs where offsetjax is not installed.
"""

import json
from importlib import resources
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from offsetjax.diffusion.noise import Noise
from offsetjax.models.pipeline import Pipeline

_PLACE = 'r"""{}"""'


def comfyui_node(pipeline: Pipeline, resolution: int, title: str, step: int) -> str:
    """The file's text.

    Args:
        resolution: of the training's pictures, in pixels.
        step: of the training, after which the noise is as strong as `noise.anneal` says.
        title: distinguishes the nodes of several models.
    """
    text = (resources.files(__package__) / "comfyui_node.py.txt").read_text(encoding="utf-8")
    parameters = {
        "title": title,
        "channels": pipeline.autoencoder.latent_channels,
        "resolution": resolution,
        **noise_parameters(pipeline.noising.noise(step), pipeline.noising.settings),
    }
    return text.replace(_PLACE, repr(json.dumps(parameters)))


def noise_parameters(noise: Noise, settings: ConfigDict) -> dict[str, Any]:
    """What the template's `matched_noise` reads, for latents of any size; the start's, at which ψ is 1."""
    nodes, weights = np.polynomial.legendre.leggauss(24)
    pyramid = {
        "discount": settings.pyramid_discount,
        "levels": settings.pyramid_levels,
        "nodes": (3.0 + nodes).tolist(),
        "weights": (weights / 2).tolist(),
    }
    return {
        "kind": noise.kind,
        "weight": noise.weight,
        "strengths": noise.strengths.tolist(),
        "reference_pixels": noise.reference_pixels,
        "shifts": _shifts(noise),
        "share": noise.share,
        "random_strength": noise.random_strength,
        "probability": noise.probability,
        "adaptive_scale": noise.adaptive_scale if noise.data_mean is not None else 0.0,
        "data_mean": [each.tolist() for each in noise.data_mean] if noise.data_mean is not None else None,
        "pyramid": pyramid if noise.kind == "pyramid" else None,
        "spectrum": list(settings.spectrum) if noise.kind == "spectral" else None,
    }


def _shifts(noise: Noise) -> list[tuple[float, float]]:
    """The shift relative to the reference's by the number of latent pixels; none where it is 1 at every size."""
    pixels = sorted({*(side**2 for side in range(2, 513, 2)), round(noise.reference_pixels)} - {0})
    shifts = [noise.shift_from_reference(each) for each in pixels]
    return [] if all(shift == 1.0 for shift in shifts) else list(zip(map(float, pixels), shifts, strict=True))
