"""How large an offset-noise LoRA of Stable Diffusion 1.5 has to be: ranks and learning rates.

    launch/sweep.sh --config=configs/sweeps/sd15_lora.py --workdir=DIR --config.data.path=MY_DATA \
        --config.model.pretrained=STABLE_DIFFUSION_1_5

Hardware: as `configs/sd15_offset_lora.py`, eight times; not yet run at full size. Expected: `offsetjax report` draws
how far dark and bright prompts come apart at each rank, a panel a learning rate.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from offsetjax.config import load_config


def get_config() -> ConfigDict:
    config = load_config(str(Path(__file__).parents[1] / "sd15_offset_lora.py"))
    config.lora.alpha = 0.0  # as large as the rank: all ranks are scaled alike
    config.checkpoint.max_to_keep = 1
    return config


def get_grid() -> Mapping[str, Sequence[float]]:
    return {"lora.rank": (4, 8, 16, 32), "optimizer.learning_rate": (1e-4, 3e-4)}
