"""A small autoencoder for real pictures: the first of the two trainings of `configs/stamps.py`.

    offsetjax train --config=configs/stamps_autoencoder.py --workdir=runs/stamps_autoencoder

Hardware: 2 CPU cores. It is the form to follow for a new domain, for which no autoencoder exists.
"""

from ml_collections import ConfigDict

from offsetjax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.task = "autoencoder"
    config.train.steps = 1500
    config.train.global_batch_size = 8
    config.data.path = "runs/stamps_data"
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
    config.checkpoint.every_steps = 500
    config.checkpoint.max_to_keep = 1
    return config
