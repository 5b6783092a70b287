"""PyTorch models with random weights, the independent judges of ours; and what one needs to compare with them."""

import pathlib
import tempfile
from typing import Any

import diffusers
import jax
import numpy as np
import torch
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from offsetjax.formats.names import from_torch, torch_name
from offsetjax.models.tokenizer import Tokenizer, save_tokenizer, train_tokenizer

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
    """The model with all parameters drawn anew: none is 0 or 1, no two are alike, and signals keep their size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(draw / parameter[0].numel() ** 0.5)
            else:  # the gain of a normalisation, or a bias
                parameter.copy_(0.1 * draw + bool((parameter == 1).all()))
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


def tokenizer(ours: Tokenizer) -> transformers.CLIPTokenizer:
    """The tokenizer that transformers reads from the files of ours."""
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(ours, folder)
        return transformers.CLIPTokenizer.from_pretrained(folder)


def save_pipeline(directory: pathlib.Path, **parts: Any) -> diffusers.StableDiffusionPipeline:
    """Writes a random Stable Diffusion pipeline; `parts` replace its parts."""
    made = {"unet": unet, "vae": vae, "text_encoder": text_encoder, "scheduler": scheduler}
    pipeline = diffusers.StableDiffusionPipeline(
        **{name: parts[name] if name in parts else make() for name, make in made.items()},
        tokenizer=tokenizer(train_tokenizer(CAPTIONS, TEXT["vocab_size"], TEXT["max_position_embeddings"])),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(directory)
    return pipeline


def counterpart(model: Any, seed: int = 0) -> torch.nn.Module:
    """The PyTorch model that one of ours describes, with random weights."""
    config = model.torch_config()
    if "architectures" in config:
        module_class = getattr(transformers, config["architectures"][0])
        return randomise(module_class(transformers.CONFIG_MAPPING[config["model_type"]](**config)), seed)
    return randomise(getattr(diffusers, config["_class_name"]).from_config(config), seed)


def params_of(module: torch.nn.Module, model: Any) -> PyTree:
    """PyTorch's parameters, and stored buffers, as those of our model, which must have the same names and shapes."""
    tied = dict(module.named_parameters(remove_duplicate=False)).keys() - dict(module.named_parameters()).keys()
    theirs = {name: tensor.float().numpy() for name, tensor in module.state_dict().items() if name not in tied}
    like = flatten_dict(jax.eval_shape(model.init, jax.random.key(0)))
    params = {path: from_torch(path, theirs.pop(torch_name(path))) for path in like}
    assert {path: array.shape for path, array in params.items()} == {path: leaf.shape for path, leaf in like.items()}
    assert not theirs
    return unflatten_dict(params)


def relative_error(ours: Any, theirs: torch.Tensor) -> float:
    """The largest difference, in terms of the largest value."""
    expected = theirs.detach().float().numpy()
    return float(np.abs(np.asarray(ours, np.float32) - expected).max() / np.abs(expected).max())


def gradient_errors(ours: PyTree, theirs: torch.nn.Module) -> dict[str, float]:
    """By PyTorch's name, the largest difference of gradients in terms of the largest one of that parameter."""
    expected = {
        name: np.zeros(parameter.shape, np.float32) if parameter.grad is None else parameter.grad.numpy()
        for name, parameter in theirs.named_parameters()
    }
    largest = max(np.abs(gradient).max() for gradient in expected.values())
    errors = {}
    for path, gradient in flatten_dict(ours).items():
        wanted = from_torch(path, expected[torch_name(path)])
        # Some gradients are zero but for rounding: a shift of all keys does not change a softmax.
        scale = max(np.abs(wanted).max(), 1e-4 * largest)
        errors[torch_name(path)] = float(np.abs(gradient - wanted).max() / scale)
    assert errors.keys() == expected.keys()
    return errors
