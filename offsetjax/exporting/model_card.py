"""The README.md of an exported model: what a PyTorch user needs to sample it from the noise of its training."""

from collections.abc import Iterator

from ml_collections import ConfigDict

from offsetjax.diffusion.noise import Noise, describe
from offsetjax.models.pipeline import Pipeline, grid_shift
from offsetjax.sampling.reach import brightness_reach, start_in_words

SPECTRUM_FILE = "noise/root_spectrum.safetensors"

_FAILS = 0.5  # of the spread that a matched start returns, below which a plain one must not be used


def model_card(pipeline: Pipeline, sample: ConfigDict, resolution: int, step: int) -> str:
    """The text of README.md, with a recipe in PyTorch that runs in the model's folder.

    Args:
        sample: the section of the config.
        resolution: of the pictures, in pixels.
    """
    noising, (channels, size, _) = pipeline.noising, pipeline.latent_shape(resolution)
    process, noise = noising.process, noising.noise(step)
    shift = grid_shift(pipeline, sample.shift, size * size)
    return _CARD.format(
        step=step,
        pipeline=pipeline.family.files.pipeline,
        resolution=resolution,
        prediction=process.predicts,
        noise=describe(noise, noising.settings, size, size),
        latents="\n".join(f"    {line}" for line in _latents(noise, channels, size)),
        settings=", ".join(
            f"{name}={sample[field]!r}"
            for name, field in (
                ("num_inference_steps", "num_steps"),
                ("guidance_scale", "guidance_scale"),
                ("guidance_rescale", "guidance_rescale"),
            )
        ),
        advice="\n\n".join(
            (*_start_advice(pipeline, sample, resolution, step), *filter(None, (process.advice(shift),)))
        ),
    )


def _start_advice(pipeline: Pipeline, sample: ConfigDict, resolution: int, step: int) -> Iterator[str]:
    noising = pipeline.noising
    noise, anneal = noising.noise(step), noising.settings.anneal
    numbers = f"By the algebra of an exact denoiser, {start_in_words(pipeline, sample, resolution, step)}."
    if noise.is_plain:
        yield "With plain noise, PyTorch's default start is the right one."
        if anneal and not noising.noise().is_plain:
            yield (
                f"The noise of most of its training was {noising.settings.kind} noise; over the last "
                f"{anneal:.3g} of it the noise became plain."
            )
        yield numbers
        return
    found = brightness_reach(pipeline, sample, resolution, noise, is_exported=True)
    if found.plain < _FAILS * found.matched:
        yield f"**Do not start it from plain noise**: pictures would come out alike in brightness. {numbers}"
    else:
        yield numbers
    yield _ANCESTRAL if noise.kind == "adjusted" and not noising.process.includes_rate else _DETERMINISTIC
    yield _COMFYUI


_CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
---

A latent diffusion model, trained with offsetjax for {step} steps at {resolution} px; it predicts {prediction}.

Training noise: {noise}.

Start from the same noise: from PyTorch's default a model that was trained with another noise draws too few dark and
bright pictures.

    import torch
    from diffusers import {pipeline}

    pipeline = {pipeline}.from_pretrained(".")
    prompts = ["a town square lit only by torchlight"]
    b = len(prompts)
{latents}
    images = pipeline(prompts, latents=latents, {settings}).images

{advice}
"""

_DETERMINISTIC = "Any deterministic scheduler will do (DDIM, Euler, DPM-Solver++); an ancestral one adds plain noise."
_ANCESTRAL = (
    "Use an ancestral scheduler (DDPM, Euler ancestral): the noise's shift changes with time, of which PyTorch's "
    "deterministic schedulers know nothing."
)
_COMFYUI = (
    "In ComfyUI: `offsetjax export --format=comfyui_node --out=FILE.py` writes a file for `custom_nodes`, whose noise "
    "node takes the place of RandomNoise in front of SamplerCustomAdvanced."
)


def _latents(noise: Noise, channels: int, size: int) -> list[str]:
    """Lines of PyTorch that draw `latents`, `[b, c, h, w]`."""
    lines = [f"latents = torch.randn(b, {channels}, {size}, {size})"]
    if noise.spectrum is not None:
        lines = [
            "from safetensors.torch import load_file",
            "",
            *lines,
            f'root_spectrum = load_file("{SPECTRUM_FILE}")["root_spectrum"]',
            f"latents = torch.fft.irfft2(torch.fft.rfft2(latents) * root_spectrum, s=({size}, {size}))",
        ]
    strengths = noise.strengths_at(size, size)
    if strengths.any() or noise.adaptive_scale:
        # Nine digits distinguish float32 numbers.
        values = ", ".join(f"{strength:.9g}" for strength in strengths)
        lines.append(f"strength = torch.tensor([{values}]).reshape(1, -1, 1, 1)")
        if noise.random_strength:
            lines.append("strength = strength * torch.rand(b, 1, 1, 1)")
        if noise.adaptive_scale and noise.data_mean is not None:
            scale = noise.adaptive_scale_at(size * size)
            mean, deviation = (", ".join(f"{x:.9g}" for x in values) for values in noise.data_mean)
            lines += [
                f"mean, deviation = torch.tensor([[{mean}], [{deviation}]]).reshape(2, 1, -1, 1, 1)",
                f"data_mean = mean + deviation * torch.randn(b, {channels}, 1, 1)",
                f"strength = (strength + {scale:.9g} * data_mean.abs()).clamp(min=0)",
            ]
        if noise.probability < 1:
            lines.append(f"strength = strength * (torch.rand(b, 1, 1, 1) < {noise.probability:.9g})")
        lines.append(f"latents = latents + strength * torch.randn(b, {channels}, 1, 1)")
    return lines
