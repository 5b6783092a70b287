"""How strong an offset the article's experiment in small needs: four strengths, two seeds each.

    launch/local.sh pictures forty --out=runs/forty_pictures
    launch/local.sh data build --images=runs/forty_pictures --out=runs/forty
    launch/sweep.sh --config=configs/sweeps/article_strength.py --workdir=runs/strength --config.data.path=runs/forty
    launch/local.sh report --workdir=runs/strength --out=runs/strength.html

Hardware: 2 CPU cores, about 4 minutes a run beside other work. Expected: with plain noise and with .05 the prompts stay
grey, a range of .15 and .13 in mean brightness; .1 and .2 were not run yet.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from offsetjax.config import load_config


def get_config() -> ConfigDict:
    config = load_config(str(Path(__file__).parents[1] / "article" / "fine_tune.py"))
    config.train.steps = 150
    config.train.log_every_steps = 10
    config.optimizer.learning_rate = 1e-3
    config.checkpoint.every_steps = 75
    config.sample.every_steps = 75
    config.sample.start_noise = "matched"
    config.probe.every_steps = 150
    config.probe.seeds_per_prompt = 16
    return config


def get_grid() -> Mapping[str, Sequence[float]]:
    return {"noise.offset_strength": (0.0, 0.05, 0.1, 0.2), "seed": (0, 1)}
