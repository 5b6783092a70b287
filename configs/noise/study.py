"""The study of noise in small: one model from scratch, pictures from black to white, one kind of noise a run.

    launch/local.sh study --out=runs/noise

trains every variant of `offsetjax/study/variants.py` with three seeds. One run by itself, here with offset noise:

    launch/local.sh train --config=configs/noise/study.py --workdir=DIR --config.data.path=runs/noise/data \
        --config.noise.offset_strength=0.1

Hardware: 2 CPU cores, 5 to 10 minutes a run, two at a time. Expected: `configs/noise/study.json`, in words in
`offsetjax/diffusion/README.md`.
"""

from pathlib import Path

from ml_collections import ConfigDict

from offsetjax.config import default_config
from offsetjax.config.presets import small


def get_config() -> ConfigDict:
    config = default_config()
    small(config)
    config.model.unet.update(  # narrow where the latent is large: 34 pictures a second on one core
        block_out_channels=(8, 16, 32, 64),
        down_block_types=("DownBlock2D",) * 3 + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * 3,
        attention_head_dim=(4,) * 4,
    )
    config.model.vae = default_config().model.vae  # that of the pretrained one
    config.model.pretrained = str(Path(__file__).parents[1] / "article" / "pretrained")
    config.model.from_scratch = ("unet", "text_encoder", "tokenizer")
    config.train.steps = 600
    config.train.global_batch_size = 8
    config.data.split = "train[:95%]"
    config.data.resolution = 128
    config.schedule.prediction_type = "v_prediction"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.ema_decay = 0.99
    config.checkpoint.every_steps = 600
    config.checkpoint.max_to_keep = 1
    config.sample.every_steps = 0
    config.sample.num_steps = 25
    config.sample.guidance_scale = 1.0
    config.validation.every_steps = 600
    config.validation.split = "train[95%:]"
    config.validation.num_examples = 32
    return config
