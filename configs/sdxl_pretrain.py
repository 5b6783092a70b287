"""Pretrains the denoiser of Stable Diffusion XL from random weights with offset noise.

    launch/local.sh train --config=configs/sdxl_pretrain.py --workdir=gs://my-bucket/run \
        --config.data.path=gs://my-bucket/data --config.model.pretrained=SDXL_BASE

The autoencoder and the text encoders are those of model.pretrained, which does not change them. With an
empty model.pretrained and model.from_scratch all is drawn at random, which tries a pod out, no more.
The strength is the SDXL report's (arXiv 2307.01952).

Hardware: a v5p-512. By `offsetjax plan --topology=v5p:4x8x8`, with the mesh set below, a chip's
batch of 8 takes 6.8 of 95.7 GiB, and a step 0.77 to 0.86 s: 600,000 steps in 128 to 143 hours, beside compiling,
evaluating and saving. Not yet run at full size.
"""

from ml_collections import ConfigDict

from offsetjax.config import default_config
from offsetjax.config.presets import stable_diffusion_xl


def get_config() -> ConfigDict:
    config = default_config()
    stable_diffusion_xl(config)
    config.model.pretrained = "stable-diffusion-xl-base-1.0"
    config.model.from_scratch = ("unet",)
    config.train.steps = 600_000
    config.train.global_batch_size = 2048
    config.train.log_every_steps = 100
    config.data.resolution = 1024
    config.data.num_workers = 16
    config.model.remat = "blocks"
    config.mesh.fsdp = 64  # on fewer devices: -1, with mesh.data = 1
    config.mesh.data = -1
    config.noise.offset_strength = 0.05
    config.noise.reference_resolution = 1024
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 10_000
    config.optimizer.decay = "constant"
    config.checkpoint.every_steps = 1000
    config.sample.every_steps = 5000
    config.sample.prompts = (
        "a dark alley in a rainstorm",
        "a monochrome line-art logo on a white background",
        "a ski slope on a sunny day",
        "a town square lit only by torchlight",
    )
    return config
