"""Turns Stable Diffusion 1.5 into a rectified flow with offset noise.

    launch/local.sh data build --images=MY_PICTURES --out=MY_DATA
    launch/local.sh train --config=configs/sd15_flow.py --workdir=DIR --config.data.path=MY_DATA \
        --config.model.pretrained=STABLE_DIFFUSION_1_5

The network, which predicts the noise, learns to predict the velocity n - x0 at 1000 t; as a LoRA with
--config.lora.rank=64 --config.optimizer.learning_rate=1e-4. Draw from the matched start: from plain noise this model
would have 15 % of the spread of brightness. In ComfyUI it needs ModelSamplingSD3.

Hardware: a v5e-8. By `offsetjax plan --topology=v5e:2x4` a chip's batch of 4 takes 6.9 of 15.8 GiB, and a step 0.12
to 0.20 s: 5,000 steps in 10 to 17 minutes, beside compiling, evaluating and saving. Not yet run at full size.
"""

from ml_collections import ConfigDict

from offsetjax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.train.steps = 5000
    config.train.global_batch_size = 32
    config.data.resolution = 512
    config.model.family = "sd1"
    config.model.pretrained = "stable-diffusion-v1-5"
    config.mesh.fsdp = -1
    config.mesh.data = 1
    config.schedule.process = "flow"
    config.schedule.conversion = "plain"
    config.timesteps.density = "logit_normal"
    config.timesteps.stratified = True
    config.noise.offset_strength = 0.1
    config.optimizer.learning_rate = 1e-5
    config.optimizer.ema_decay = 0.999
    config.sample.every_steps = 500
    config.sample.sampler = "dpmpp_2m"
    config.sample.num_steps = 28
    config.sample.prompts = (
        "a dark alley in a rainstorm",
        "a monochrome line-art logo on a white background",
        "a ski slope on a sunny day",
        "a town square lit only by torchlight",
    )
    return config
