"""Fine-tunes Stable Diffusion 1.5 on your own pictures with offset noise, so that it can draw black and white.

    launch/local.sh data build --images=MY_PICTURES --out=MY_DATA
    launch/local.sh train --config=configs/sd15_offset.py --workdir=DIR --config.data.path=MY_DATA \
        --config.model.pretrained=STABLE_DIFFUSION_1_5

The model is a diffusers directory or a single .safetensors file. To train the text encoder as well, add
--config.train.text_encoders=true --config.optimizer.text_encoder_learning_rate=2e-6.

Hardware: a v5e-8. By `offsetjax plan --topology=v5e:2x4` a chip's batch of 1 takes 4.7 of 15.8 GiB, and a step 0.08
to 0.12 s: 1,000 steps in 1 to 2 minutes, beside compiling, evaluating and saving. Not yet run at full size. Expected:
the article saw the mean brightness of dark and bright prompts move within about 1,000 steps on 40 pictures.
"""

from ml_collections import ConfigDict

from offsetjax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.train.steps = 1000
    config.train.global_batch_size = 8
    config.data.resolution = 512
    config.model.family = "sd1"
    config.model.pretrained = "stable-diffusion-v1-5"
    config.mesh.fsdp = -1
    config.mesh.data = 1
    config.noise.offset_strength = 0.1
    config.noise.reference_resolution = 512  # at another data.resolution the mean's SNR is the same
    config.loss.min_snr_gamma = 5.0
    config.optimizer.learning_rate = 1e-5
    config.optimizer.ema_decay = 0.999
    config.sample.every_steps = 250
    config.sample.prompts = (
        "a dark alley in a rainstorm",
        "a monochrome line-art logo on a white background",
        "a ski slope on a sunny day",
        "a town square lit only by torchlight",
    )
    return config
