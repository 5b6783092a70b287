"""Fine-tunes Stable Diffusion XL on your own pictures of 1024 px with offset noise.

    launch/local.sh data build --images=MY_PICTURES --out=MY_DATA
    launch/local.sh train --config=configs/sdxl_offset.py --workdir=DIR --config.data.path=MY_DATA \
        --config.model.pretrained=SDXL_BASE

The strength is that of the SDXL report (arXiv 2307.01952), 0.05; it hides the mean less than 0.1 does, at any size (see
offsetjax/diffusion/README.md, "Size"). The model is given the pictures' original sizes and
crops as they are.

Hardware: a v5e-8. By `offsetjax plan --topology=v5e:2x4` a chip's batch of 1 takes 8.5 of 15.8 GiB, and a step 0.29
to 0.54 s: 1,000 steps in 5 to 9 minutes, beside compiling, evaluating and saving. Not yet run at full size. Expected:
as for configs/sd15_offset.py.
"""

from ml_collections import ConfigDict

from offsetjax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.train.steps = 1000
    config.train.global_batch_size = 8
    config.data.resolution = 1024
    config.model.family = "sdxl"
    config.model.pretrained = "stable-diffusion-xl-base-1.0"
    config.model.remat = "blocks"
    config.mesh.fsdp = -1
    config.mesh.data = 1
    config.noise.offset_strength = 0.05
    config.noise.reference_resolution = 1024  # at another data.resolution the mean's SNR is the same
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
