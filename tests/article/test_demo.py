"""The demonstration, run as a user runs it, shows what the article shows."""

import json
import math
import os
import subprocess
import sys

import pytest

from offsetjax.article.pictures import BLACK_PROMPT, PROMPTS


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    out = tmp_path_factory.mktemp("the demo")
    # In a process of its own, which sees the machine as a user's does and not the virtual devices of the tests.
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    subprocess.run([sys.executable, "-m", "offsetjax", "demo", f"--out={out}"], check=True, env=environment)
    return out / "report.html"


@pytest.fixture(scope="module")
def arms(page):
    numbers = json.loads((page.parent / "report.json").read_text())
    return {arm["name"]: arm for arm in numbers["arms"]}


def _means(samples):
    return [samples["prompts"][prompt]["mean"] for prompt in PROMPTS]


pytestmark = pytest.mark.timeout(1800)  # ten minutes on two free cores


def test_the_base_model_draws_every_prompt_grey(arms):
    for mean in _means(arms["plain"]["before"]):
        assert 0.35 <= mean <= 0.65


def test_the_control_stays_grey(arms):
    means = _means(arms["plain"]["after"])
    assert max(means) - min(means) <= 0.2


def test_offset_noise_takes_the_prompts_from_black_to_white(arms):
    means = _means(arms["offset"]["after"])
    assert means[-1] - means[0] >= 0.5
    assert means == sorted(means)  # PROMPTS go from dark to bright


def test_both_learn_one_black_picture_and_offset_noise_faster(arms):
    plain, offset = (
        [samples["prompts"][BLACK_PROMPT]["mean"] for samples in arms[name]["samples"]]
        for name in ("black_plain", "black_offset")
    )
    assert plain[0] == offset[0] > 0.35
    assert offset[-1] < 0.1
    assert plain[-1] < 0.1  # the article's plain control did not; at this scale it does
    assert sum(offset) < sum(plain)


def test_the_matched_start_and_not_the_training_restores_the_spread(arms):
    drawn = arms["offset"]["unconditional"]
    assert drawn["matched"]["std"] > 2 * drawn["plain"]["std"]


def test_the_page_stands_alone(page):
    html = page.read_text()
    assert "data:image/png;base64," in html
    assert 'src="http' not in html
    assert "nan" not in (page.parent / "report.json").read_text().lower()


def test_all_steps_were_run(arms):
    for arm in arms.values():
        assert arm["steps"] == arm["steps_configured"]
        assert math.isfinite(arm["last_loss"])
        assert arm["steps_skipped"] == 0
