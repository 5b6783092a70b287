"""An offset-noise LoRA for Stable Diffusion 2.1: the small file that lets a stock model do
black and white.

    launch/local.sh data build --images=MY_PICTURES --out=MY_DATA
    launch/local.sh train --config=configs/sd21_offset_lora.py --workdir=DIR --config.data.path=MY_DATA \
        --config.model.pretrained=STABLE_DIFFUSION_2_1
    launch/local.sh export --workdir=DIR --format=lora --dtype=float16 --out=offset_lora.safetensors

The frozen weights are held in bfloat16; the optimizer sees the adapters alone. More layers, such as the feed-forward's,
are named in lora.targets ("ff.net.0.proj", "ff.net.2"); adapters for the text encoders come with
--config.train.text_encoders=true --config.optimizer.text_encoder_learning_rate=5e-5.

Hardware: a v5e-4. By `offsetjax plan --topology=v5e:2x2` a chip's batch of 1 takes 4.6 of 15.8 GiB, and a step 0.06
s: 1,000 steps in a minute, beside compiling, evaluating and saving. Not yet run at full size. Expected: as for the
fine-tuning of all weights, as strongly as the weight that a program gives the LoRA.
"""

from ml_collections import ConfigDict

from offsetjax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.train.steps = 1000
    config.train.global_batch_size = 4
    config.data.resolution = 768
    config.model.family = "sd2"
    config.model.pretrained = "stable-diffusion-2-1"
    config.lora.rank = 16
    config.lora.alpha = 16.0
    config.noise.offset_strength = 0.1
    config.noise.reference_resolution = 768
    config.optimizer.learning_rate = 1e-4
    config.optimizer.weight_decay = 0.0
    config.optimizer.ema_decay = 0.99
    config.sample.every_steps = 250
    config.sample.prompts = (
        "a dark alley in a rainstorm",
        "a monochrome line-art logo on a white background",
        "a ski slope on a sunny day",
        "a town square lit only by torchlight",
    )
    return config
