"""A small autoencoder for real pictures: the first of the two trainings of `configs/stamps.py`.

    launch/local.sh train --config=configs/stamps_autoencoder.py --workdir=runs/stamps_autoencoder

Hardware: 2 CPU cores. It is the form to follow for a new domain, for which no autoencoder exists.
"""

from ml_collections import ConfigDict

from offsetjax.config import default_config
from offsetjax.config.presets import small_autoencoder


def get_config() -> ConfigDict:
    config = default_config()
    small_autoencoder(config)
    config.train.steps = 1500
    config.data.path = "runs/stamps_data"
    return config
