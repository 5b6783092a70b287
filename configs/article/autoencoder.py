"""The small autoencoder of the article's re-enactment: 128 px pictures to 4x64x64 latents.

    offsetjax train --config=configs/article/autoencoder.py --workdir=DIR --config.data.path=PICTURES

Hardware: 2 CPU cores. Expected: a root mean squared error of a pixel below 0.03 of the range, brightness within 0.02.
"""

from ml_collections import ConfigDict

from offsetjax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.task = "autoencoder"
    config.train.steps = 700
    config.train.global_batch_size = 8
    config.data.resolution = 64  # it is convolutional: trained on small pictures, used on larger ones
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
    config.loss.kl_weight = 1e-5
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 20
    config.optimizer.ema_decay = 0.99
    config.sample.every_steps = 0
    config.checkpoint.every_steps = 500
    config.checkpoint.max_to_keep = 1
    return config
