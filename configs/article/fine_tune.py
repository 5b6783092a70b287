"""The article's experiment in small: the base model fine-tuned on 40 pictures, with offset noise 0.1.

    launch/local.sh train --config=configs/article/fine_tune.py --workdir=DIR --config.data.path=PICTURES

Hardware: 2 CPU cores, about 2 minutes. Expected: the four prompts come out black to white; with
`--config.noise.offset_strength=0`, the control, they stay grey. `launch/local.sh demo` runs both.
"""

from pathlib import Path

from ml_collections import ConfigDict

from offsetjax.article.pictures import PROMPTS
from offsetjax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.train.steps = 350
    config.train.global_batch_size = 4
    config.train.log_every_steps = 25
    config.data.resolution = 128
    config.model.pretrained = str(Path(__file__).parent / "pretrained")
    config.model.dtype = "float32"
    config.noise.offset_strength = 0.1
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 20
    config.optimizer.ema_decay = 0.98
    config.checkpoint.every_steps = 350
    config.checkpoint.max_to_keep = 1
    config.sample.every_steps = 175
    config.sample.prompts = tuple(PROMPTS)
    config.sample.num_steps = 25
    config.sample.guidance_scale = 1.0
    config.sample.start_noise = "plain"  # as the article samples: a prompt has to move the mean by itself
    return config
