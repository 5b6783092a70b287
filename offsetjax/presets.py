"""Architectures that several configs share."""

from ml_collections import ConfigDict


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
