"""The small autoencoder of the article's re-enactment: 128 px pictures to 4x64x64 latents.

    offsetjax train --config=configs/article/autoencoder.py --workdir=DIR --config.data.path=PICTURES

Hardware: 2 CPU cores. Expected: a root mean squared error of a pixel below 0.03 of the range, brightness within 0.02.
"""

from ml_collections import ConfigDict

from offsetjax.config import default_config
from offsetjax.presets import small_autoencoder


def get_config() -> ConfigDict:
    config = default_config()
    small_autoencoder(config)
    config.train.steps = 700
    return config
