"""Real pictures with captions: the 538 drawings and photos of Tux Paint's stamps, each on four grounds.

    apt-get install tuxpaint-stamps-default
    launch/local.sh pictures stamps --out=runs/stamps_pictures
    launch/local.sh data build --images=runs/stamps_pictures --out=runs/stamps_data
    launch/local.sh train --config=configs/stamps_autoencoder.py --workdir=runs/stamps_autoencoder
    launch/local.sh export --workdir=runs/stamps_autoencoder --out=runs/stamps_vae
    launch/local.sh train --config=configs/stamps.py --workdir=runs/stamps

Hardware: it runs on 2 CPU cores, slowly; 8 chips of a TPU v5e are what it is for. Expected: after the few hundred steps
that a laptop has patience for, the ground's brightness follows the caption; the drawings take far longer.
"""

from ml_collections import ConfigDict

from offsetjax.config import default_config
from offsetjax.config.presets import small


def get_config() -> ConfigDict:
    config = default_config()
    small(config)
    config.model.pretrained = "runs/stamps_vae"
    config.model.from_scratch = ("unet", "text_encoder", "tokenizer")
    config.train.steps = 2000
    config.train.global_batch_size = 8
    config.data.path = "runs/stamps_data"
    config.data.resolution = 128
    config.noise.offset_strength = 0.1
    config.schedule.prediction_type = "v_prediction"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.ema_decay = 0.995
    config.checkpoint.max_to_keep = 1
    config.sample.prompts = tuple(
        f"A windmill, on a {ground} background." for ground in ("black", "dark blue", "grey", "white")
    )
    config.sample.num_steps = 25
    config.sample.guidance_scale = 1.0
    return config
