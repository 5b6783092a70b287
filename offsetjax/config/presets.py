"""Architectures that several configs share: Stable Diffusion's, whole or in small, and one that two cores can train.

The published models' numbers of parameters (denoiser; text encoders; each has the autoencoder's 83,653,863):

    Stable Diffusion 1.x    859,520,964    123,060,480
    Stable Diffusion 2.x    865,910,724    340,387,840
    Stable Diffusion XL   2,567,463,684    123,060,480 and 694,659,840
"""

from typing import Any

from ml_collections import ConfigDict

from offsetjax.diffusion.variance_preserving import latent_side
from offsetjax.errors import UserError


def stable_diffusion_1(config: ConfigDict, shrink: int = 1) -> None:
    """Sets `config.model` to Stable Diffusion 1.x.

    Args:
        shrink: 1, 2, 4 or 8, divides every width, and the groups of the normalisations, and leaves all else as it is:
            blocks, layers, heads, vocabulary. What should be smaller still can be set afterwards.
    """
    _set_family(config, "sd1", shrink, size=512)
    config.model.unet.update(_UNET_1_AND_2, attention_head_dim=(8,) * 4)
    config.model.unet.update(_divided(shrink, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768))
    config.model.text_encoder.update(_clip_l(shrink))


def stable_diffusion_2(config: ConfigDict, shrink: int = 1, prediction_type: str = "v_prediction") -> None:
    """Sets `config.model`, and `schedule.prediction_type`, to Stable Diffusion 2.x.

    Args:
        shrink: see `stable_diffusion_1`.
        prediction_type: `v_prediction`, of pictures of 768 px, or `epsilon`, of pictures of 512 px (its "base" models).
    """
    _set_family(config, "sd2", shrink, size=8 * latent_side(prediction_type))
    config.schedule.prediction_type = prediction_type
    config.model.unet.update(_UNET_1_AND_2, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)
    config.model.unet.update(_divided(shrink, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=1024))
    config.model.text_encoder.update(
        # OpenCLIP ViT-H without its last layer
        num_hidden_layers=23,
        num_attention_heads=16,
        hidden_act="gelu",
        **_divided(shrink, hidden_size=1024, intermediate_size=4096, projection_dim=512),
    )


def stable_diffusion_xl(config: ConfigDict, shrink: int = 1) -> None:
    """Sets `config.model` to Stable Diffusion XL's base model.

    Args:
        shrink: see `stable_diffusion_1`.
    """
    _set_family(config, "sdxl", shrink, size=1024)
    config.model.force_zeros_for_empty_prompt = True
    config.model.vae.scaling_factor = 0.13025
    config.model.unet.update(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        addition_embed_type="text_time",
        **_divided(
            shrink,
            block_out_channels=(320, 640, 1280),
            cross_attention_dim=768 + 1280,
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=1280 + 6 * 256,
        ),
    )
    config.model.text_encoder.update(_clip_l(shrink))
    config.model.text_encoder_2.update(
        # OpenCLIP ViT-bigG
        num_hidden_layers=32,
        num_attention_heads=20,
        hidden_act="gelu",
        **_divided(shrink, hidden_size=1280, intermediate_size=5120, projection_dim=1280),
    )


_UNET_1_AND_2 = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "transformer_layers_per_block": (1,) * 4,
}


def _set_family(config: ConfigDict, family: str, shrink: int, size: int) -> None:
    """Sets what the families share; `size` is that of their pictures in pixels."""
    if shrink not in (1, 2, 4, 8):
        raise UserError(f"presets: shrink = {shrink} does not divide all widths; use 1, 2, 4 or 8")
    config.model.family = family
    config.model.unet.update(sample_size=size // 8, layers_per_block=2, norm_num_groups=32 // shrink)
    config.model.vae.update(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=size,
        scaling_factor=0.18215,
        mid_block_add_attention=True,
        norm_num_groups=32 // shrink,
        **_divided(shrink, block_out_channels=(128, 256, 512, 512)),
    )


def _clip_l(shrink: int) -> dict[str, Any]:
    """OpenAI's CLIP ViT-L."""
    widths = _divided(shrink, hidden_size=768, intermediate_size=3072, projection_dim=768)
    return {"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "quick_gelu", **widths}


def _divided(divisor: int, **widths: int | tuple[int, ...]) -> dict[str, int | tuple[int, ...]]:
    return {
        name: tuple(one // divisor for one in width) if isinstance(width, tuple) else width // divisor
        for name, width in widths.items()
    }


def small(config: ConfigDict) -> None:
    """Sets `config.model` to 128 px pictures, 4x64x64 latents and 1 M parameters, which two CPU cores can train.

    The latents have Stable Diffusion's size, on which the effect of offset noise depends; the widths are the least that
    draw anything. The autoencoder's scale is unknown until it is trained, hence `scaling_factor = 0`.
    """
    config.model.dtype = "float32"
    config.model.unet.update(
        sample_size=64,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        attention_head_dim=(4, 4, 4),
        transformer_layers_per_block=(1, 1, 1),
        cross_attention_dim=64,
        norm_num_groups=8,
    )
    config.model.vae.update(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=128,
        scaling_factor=0.0,
        mid_block_add_attention=False,
    )
    config.model.text_encoder.update(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=24,
        projection_dim=64,
    )


def small_autoencoder(config: ConfigDict) -> None:
    """Sets `config` to train the autoencoder of `small`.

    On 64 px pictures: it is convolutional, and serves larger ones as well.
    """
    small(config)
    config.task = "autoencoder"
    config.train.global_batch_size = 8
    config.data.resolution = 64
    config.loss.kl_weight = 1e-5
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 20
    config.optimizer.ema_decay = 0.99
    config.sample.every_steps = 0
    config.checkpoint.max_to_keep = 1
