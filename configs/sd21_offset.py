"""Fine-tunes Stable Diffusion 2.1 on your own pictures of 768 px with offset noise.

    launch/local.sh data build --images=MY_PICTURES --out=MY_DATA
    launch/local.sh train --config=configs/sd21_offset.py --workdir=DIR --config.data.path=MY_DATA \
        --config.model.pretrained=STABLE_DIFFUSION_2_1

What it predicts, v (2.1) or ε (2.1 base), is read from the model; for the base model add --config.data.resolution=512.
The strength is 0.1 at any size: on one schedule that keeps the SNR of the mean.

Hardware: a v5e-8. By `offsetjax plan --topology=v5e:2x4` a chip's batch of 1 takes 5.7 of 15.8 GiB, and a step 0.08
to 0.16 s: 1,000 steps in 1 to 3 minutes, beside compiling, evaluating and saving. Not yet run at full size. Expected:
as for configs/sd15_offset.py.
"""

from ml_collections import ConfigDict

from offsetjax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.train.steps = 1000
    config.train.global_batch_size = 8
    config.data.resolution = 768
    config.model.family = "sd2"
    config.model.pretrained = "stable-diffusion-2-1"
    config.mesh.fsdp = -1
    config.mesh.data = 1
    config.noise.offset_strength = 0.1
    config.noise.reference_resolution = 768  # at another data.resolution the mean's SNR is the same
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
