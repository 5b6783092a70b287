"""The article's experiment in small with each kind of noise: a list of grids, for what goes together.

    launch/sweep.sh --config=configs/sweeps/article_kinds.py --workdir=runs/kinds --config.data.path=runs/forty

Hardware: as `configs/sweeps/article_strength.py`, which says where the pictures are from. What each
kind is: `offsetjax/diffusion/README.md`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from offsetjax.config import load_config


def get_config() -> ConfigDict:
    config = load_config(str(Path(__file__).parent / "article_strength.py"))
    config.noise.offset_strength = 0.0
    config.schedule.prediction_type = "v_prediction"  # that of the model, without which a zero terminal SNR is refused
    return config


def get_grid() -> Sequence[Mapping[str, Sequence[Any]]]:
    return [
        {"noise.kind": ["offset"], "noise.offset_strength": [0.0, 0.1]},
        {"noise.kind": ["adjusted"], "noise.offset_strength": [0.1]},
        {"noise.kind": ["pyramid"], "noise.pyramid_discount": [0.8], "noise.pyramid_levels": [6]},
        {"schedule.zero_terminal_snr": [True]},
    ]
