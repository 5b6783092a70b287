"""Run in any environment with diffusers: draws with a model from given latents, and saves what was loaded.

    python draw.py MODEL OUT.npy [--single=FILE] [--lora=FILE] [--save=FOLDER] [--save_lora=FOLDER]

MODEL is a diffusers directory, or the config of the single file. A part's tensors of `--save` are what was loaded.
"""

import argparse
import pathlib

import diffusers
import numpy as np
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("out")
    for name in ("single", "lora", "save", "save_lora"):
        parser.add_argument(f"--{name}")
    options = parser.parse_args()

    pipeline = diffusers.DiffusionPipeline.from_pretrained(options.model, local_files_only=True)
    if options.single:
        single = {"config": options.model, "local_files_only": True}
        pipeline = type(pipeline).from_single_file(options.single, **single)
    if options.lora:
        file = pathlib.Path(options.lora)
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    side = 64 // pipeline.vae_scale_factor
    latents = np.random.default_rng(0).standard_normal((1, 4, side, side)).astype(np.float32)
    drawn = pipeline(
        "a red boat on a dark lake",
        latents=torch.from_numpy(latents),
        height=64,
        width=64,
        num_inference_steps=2,
        output_type="latent",
    ).images
    np.save(options.out, drawn.numpy())
    if options.save:
        pipeline.save_pretrained(options.save)
    if options.save_lora:
        save_lora(pipeline, options.save_lora)


def save_lora(pipeline: diffusers.DiffusionPipeline, folder: str) -> None:
    """Writes the adapters that are loaded as this version of diffusers writes those that it has trained."""
    saved = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        module = getattr(pipeline, part, None)
        for adapter, config in getattr(module, "peft_config", {}).items():
            tensors = get_peft_model_state_dict(module, adapter_name=adapter)
            saved[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(tensors)
            saved[f"{part}_lora_adapter_metadata"] = config.to_dict()
    pipeline.save_lora_weights(folder, **saved)


if __name__ == "__main__":
    main()
