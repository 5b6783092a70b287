"""Turns Stable Diffusion XL into a rectified flow with offset noise, by a LoRA or (lora.rank = 0) by all weights.

    launch/local.sh data build --images=MY_PICTURES --out=MY_DATA
    launch/local.sh train --config=configs/sdxl_flow.py --workdir=DIR --config.data.path=MY_DATA \
        --config.model.pretrained=STABLE_DIFFUSION_XL
    launch/local.sh export --workdir=DIR --format=lora --dtype=float16 --out=sdxl_flow_lora.safetensors

The network, which predicts the noise, learns to predict the velocity n - x0 at 1000 t. Where the model is a flow
already and its files do not say so, the same config continues it. Without an offset, brightness is decided above
t = .987 at this size, where next to nothing is trained; see offsetjax/diffusion/README.md. Draw from the matched start:
from plain noise this model would have a tenth of the spread of brightness. In ComfyUI it needs ModelSamplingSD3.

Hardware: a v5e-16. By `offsetjax plan --topology=v5e:4x4` a chip's batch of 2 takes 5.3 of 15.8 GiB, and a step 0.43
to 0.54 s: 5,000 steps in 36 to 46 minutes, 9 to 12 chip-hours, beside compiling, evaluating and saving. Not yet run at
full size.
"""

from ml_collections import ConfigDict

from offsetjax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.train.steps = 5000
    config.train.global_batch_size = 32
    config.data.resolution = 1024
    config.model.family = "sdxl"
    config.model.pretrained = "stable-diffusion-xl-base-1.0"
    config.model.remat = "blocks"
    config.lora.rank = 64
    config.mesh.fsdp = -1
    config.mesh.data = 1
    config.schedule.process = "flow"
    config.schedule.conversion = "plain"
    config.schedule.shift = 3.0
    config.timesteps.density = "logit_normal"
    config.timesteps.stratified = True
    config.noise.offset_strength = 0.1
    config.optimizer.learning_rate = 1e-4
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
