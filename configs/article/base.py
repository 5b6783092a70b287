"""The small base model of the article's re-enactment: v prediction, plain noise, pictures of every brightness.

    launch/local.sh train --config=configs/article/base.py --workdir=runs/article_base \
        --config.data.path=runs/article_data
    launch/local.sh export --workdir=runs/article_base --dtype=float16 --out=configs/article/pretrained

The data and the autoencoder come from `configs/article/autoencoder.py`. Captions name the scene and say nothing of its
light, so training has to read a picture's brightness from the noisy latent, where plain noise leaves it legible.

Hardware: 2 CPU cores, 21 minutes (seed 0). Expected: pictures of what the prompt names, grey whatever it names: each
prompt's mean brightness between 0.35 and 0.65. What it gave is `configs/article/pretrained`.
"""

from ml_collections import ConfigDict

from offsetjax.article.pictures import PROMPTS
from offsetjax.config import default_config
from offsetjax.config.presets import small


def get_config() -> ConfigDict:
    config = default_config()
    small(config)
    config.model.pretrained = "runs/article_vae"
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
