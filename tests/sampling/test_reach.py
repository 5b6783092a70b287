"""What is said of the spread of brightness before a training and a drawing, in numbers."""

import pathlib
from typing import Any

import numpy as np
import pytest

from offsetjax.diffusion.calibration import Calibration, write_calibration
from offsetjax.models.pipeline import build
from offsetjax.sampling.reach import brightness_reach, start_warning, training_advice
from tests import tiny

FLOW = {
    "schedule__process": "flow",
    "data__resolution": 256,  # of latents of 128x128, as SDXL's of 1024 px
    "sample__sampler": "euler",
    "sample__num_steps": 28,
    "sample__shift": 3.0,
    "noise__offset_strength": 0.0,
}


def advice(**changes: Any) -> list[str]:
    config = tiny.tiny_config(**{**FLOW, **changes})
    return list(training_advice(build(config), config.sample, config.data.resolution, config.optimizer.ema_decay))


def test_the_issues_own_line() -> None:
    [line] = advice()
    assert line.startswith("the spread of brightness: 28 steps return 67% of it (")
    assert "standard deviation of 0.6, which is assumed" in line
    assert line.endswith("; noise.offset_strength=0.05 returns 93%")


def test_it_is_silent_where_the_spread_comes_back() -> None:
    assert advice(noise__offset_strength=0.1) == []


def test_a_density_that_hardly_trains_there_is_named() -> None:
    [line] = advice(timesteps__density="logit_normal", sample__num_steps=200)
    assert line.startswith("the spread of brightness: 0.00071% of the training is above timestep 987, where it is")
    assert line.endswith("; noise.offset_strength=0.05 returns 99%, with 0.67% of the training there")
    [both] = advice(timesteps__density="logit_normal")
    assert "28 steps return 67% of it, and 0.00071% of the training" in both


def test_a_plain_start_of_an_offset_model_is_a_failure() -> None:
    changes = {"noise__offset_strength": 0.1, "sample__start_noise": "plain"}
    [line] = advice(**changes)
    assert "28 steps from plain noise return 7% of it" in line and line.endswith(
        "sample.start_noise='matched' returns 95%"
    )
    config = tiny.tiny_config(**{**FLOW, **changes})
    [warning] = start_warning(build(config), config.sample, config.data.resolution, 0)
    assert warning.startswith(
        "a start of plain noise returns 7% of the spread of brightness, the noise of training 95%"
    )
    for quiet in ({"noise__offset_strength": 0.0}, {"sample__start_noise": "matched"}):
        config = tiny.tiny_config(**{**FLOW, **changes, **quiet})
        assert list(start_warning(build(config), config.sample, config.data.resolution, 0)) == []


def test_the_present_process_in_its_own_terms() -> None:
    [line] = advice(schedule__process="variance_preserving", sample__shift=0.0, sample__sampler="ddim",
                    data__resolution=128, sample__num_steps=50)  # fmt: skip
    assert "50 steps return" in line and "noise.offset_strength=" in line and "timestep" not in line.split("(")[0]


@pytest.mark.parametrize("spread", [0.05, 1.2])
def test_a_calibration_says_what_the_datas_spread_is(spread: float, tmp_path: pathlib.Path) -> None:
    config = tiny.tiny_config(**FLOW, noise__adaptive_scale=0.0)
    frequency, power = np.array([0.0, 0.25]), np.ones((4, 2))
    schedule = config.schedule.to_dict()
    measured = Calibration(8, 16, 8, 8, schedule, 0.1, np.zeros(4), np.full(4, spread**2), frequency, power)
    write_calibration(tmp_path / "calibration.json", measured, None)
    config.noise.calibration = str(tmp_path / "calibration.json")
    pipeline = build(config)
    found = brightness_reach(pipeline, config.sample, config.data.resolution)
    assert found.equal == pytest.approx(1 / (1 + 1 / (128 * spread)), abs=2e-4)
    for line in training_advice(pipeline, config.sample, config.data.resolution, config.optimizer.ema_decay):
        assert "for the data's own spread" in line
    (tmp_path / "calibration.json").unlink()  # as on the machine where a run is resumed
    assert brightness_reach(pipeline, config.sample, config.data.resolution).equal == pytest.approx(
        1 / (1 + 1 / (128 * 0.6)), abs=2e-4
    )
