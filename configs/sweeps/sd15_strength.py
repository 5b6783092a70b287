"""How strong an offset Stable Diffusion 1.5 needs on your own pictures: four strengths, three seeds each.

    launch/sweep.sh --config=configs/sweeps/sd15_strength.py --workdir=DIR --config.data.path=MY_DATA \
        --config.model.pretrained=STABLE_DIFFUSION_1_5

or each on a slice of its own: see `launch/README.md`. The prompts of `configs/sd15_offset.py` may be replaced by
`--config.sample.prompts="('a night', 'snow')"`; all runs draw them from the same starts.

Hardware: as `configs/sd15_offset.py`, twelve times; not yet run at full size. Expected: at .1 what the article saw;
`offsetjax report` draws how far dark and bright prompts come apart at each strength, and how alike the seeds are.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from offsetjax.config import load_config


def get_config() -> ConfigDict:
    config = load_config(str(Path(__file__).parents[1] / "sd15_offset.py"))
    config.noise.reference_resolution = 0  # plain noise, the control, has no strength that could refer to one
    config.checkpoint.max_to_keep = 1
    config.probe.every_steps = 500
    return config


def get_grid() -> Mapping[str, Sequence[float]]:
    return {"noise.offset_strength": (0.0, 0.05, 0.1, 0.2), "seed": (0, 1, 2)}
