"""Small PyTorch models with random weights: the independent judges of ours."""

import pathlib
from typing import Any

import diffusers
import torch
import transformers

from offsetjax.models.tokenizer import save_tokenizer, train_tokenizer

torch.set_num_threads(1)

CAPTIONS = ["a ski slope on a sunny day", "a dark alley in a rainstorm", "a ski logo, monochrome", "a town square"]
UNET = {
    "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "attention_head_dim": (2, 4),
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "sample_size": 16,
}
TEXT = {
    "vocab_size": 600,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
    "projection_dim": 24,
}


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The model with each parameter moved by a normal draw, so that none is 0 or 1, and no two are alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def unet(**changes: Any) -> diffusers.UNet2DConditionModel:
    return randomise(diffusers.UNet2DConditionModel(**{**UNET, **changes}), 1)


def vae(**changes: Any) -> diffusers.AutoencoderKL:
    return randomise(diffusers.AutoencoderKL(**{**VAE, **changes}), 2)


def text_encoder(**changes: Any) -> transformers.CLIPTextModel:
    return randomise(transformers.CLIPTextModel(transformers.CLIPTextConfig(**{**TEXT, **changes})), 3)


def scheduler(**changes: Any) -> diffusers.DDIMScheduler:
    stable_diffusion = {"beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False}
    return diffusers.DDIMScheduler(1000, 0.00085, 0.012, **{**stable_diffusion, "steps_offset": 1, **changes})


def save_pipeline(directory: pathlib.Path, **parts: Any) -> diffusers.StableDiffusionPipeline:
    """Writes a random Stable Diffusion pipeline; `parts` replace its parts."""
    save_tokenizer(train_tokenizer(CAPTIONS, TEXT["vocab_size"], TEXT["max_position_embeddings"]), directory / "t")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(directory / "t")
    made = {"unet": unet, "vae": vae, "text_encoder": text_encoder, "scheduler": scheduler}
    pipeline = diffusers.StableDiffusionPipeline(
        **{name: parts[name] if name in parts else make() for name, make in made.items()},
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(directory)
    return pipeline
