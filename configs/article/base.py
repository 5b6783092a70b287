"""The small base model of the article's re-enactment: v prediction, plain noise, pictures of every brightness.

    offsetjax train --config=configs/article/base.py --workdir=DIR --config.data.path=PICTURES \
        --config.model.pretrained=AUTOENCODER

Hardware: 2 CPU cores. Expected: pictures of what the prompt names, each with a mean brightness near 0.5.
"""

from ml_collections import ConfigDict

from offsetjax.article.pictures import PROMPTS
from offsetjax.config import default_config
from offsetjax.presets import small


def get_config() -> ConfigDict:
    config = default_config()
    small(config)
    config.model.from_scratch = ("unet", "text_encoder", "tokenizer")
    config.train.steps = 1600
    config.train.global_batch_size = 8
    config.data.resolution = 128
    config.noise.offset_strength = 0.0
    config.schedule.prediction_type = "v_prediction"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.ema_decay = 0.995
    config.checkpoint.every_steps = 500
    config.checkpoint.max_to_keep = 1
    config.sample.every_steps = 400
    config.sample.prompts = tuple(PROMPTS)
    config.sample.num_steps = 25
    config.sample.guidance_scale = 1.0
    return config
