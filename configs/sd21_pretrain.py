"""Pretrains the denoiser of Stable Diffusion 2.1 from random weights with offset noise.

    launch/local.sh train --config=configs/sd21_pretrain.py --workdir=gs://my-bucket/run \
        --config.data.path=gs://my-bucket/data --config.model.pretrained=STABLE_DIFFUSION_2_1

The autoencoder and the text encoder are those of model.pretrained, which does not change them. With an
empty model.pretrained and model.from_scratch all is drawn at random, which tries a pod out, no more.
The strength is 0.03, since over long runs 0.1 washes colours out.

Hardware: a v5e-128. By `offsetjax plan --topology=v5e:8x16`, with the mesh set below, a chip's
batch of 16 takes 14.2 of 15.8 GiB, and a step 0.37 to 0.44 s: 500,000 steps in 52 to 61 hours, beside compiling,
evaluating and saving. Not yet run at full size.
"""

from ml_collections import ConfigDict

from offsetjax.config import default_config
from offsetjax.config.presets import stable_diffusion_2


def get_config() -> ConfigDict:
    config = default_config()
    stable_diffusion_2(config, prediction_type="v_prediction")
    config.model.pretrained = "stable-diffusion-2-1"
    config.model.from_scratch = ("unet",)
    config.train.steps = 500_000
    config.train.global_batch_size = 2048
    config.train.log_every_steps = 100
    config.data.resolution = 512
    config.data.num_workers = 16
    config.mesh.fsdp = 16  # on fewer devices: -1, with mesh.data = 1
    config.mesh.data = -1
    config.noise.offset_strength = 0.03
    config.noise.reference_resolution = 512
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
