"""Real pictures go the whole way: Tux Paint's stamps → data set → autoencoder → diffusion → a directory for PyTorch."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
STAMPS = pathlib.Path("/usr/share/tuxpaint/stamps")
SHORT = ("--config.train.steps=6", "--config.train.log_every_steps=2", "--config.data.resolution=64")


@pytest.mark.skipif(not STAMPS.exists() and not os.environ.get("CI"), reason="apt-get install tuxpaint-stamps-default")
def test_stamps_train_as_the_config_s_docstring_says(tmp_path):
    commands = [
        ["pictures", "stamps", "--out=runs/stamps_pictures", "--size=64"],
        ["data", "build", "--images=runs/stamps_pictures", "--out=runs/stamps_data"],
        ["train", f"--config={ROOT}/configs/stamps_autoencoder.py", "--workdir=runs/stamps_autoencoder", *SHORT],
        ["export", "--workdir=runs/stamps_autoencoder", "--out=runs/stamps_vae"],
        [
            "train", f"--config={ROOT}/configs/stamps.py", "--workdir=runs/stamps", *SHORT,
            "--config.sample.num_steps=2", "--config.sample.seeds_per_prompt=1",
        ],
        ["export", "--workdir=runs/stamps", "--out=runs/stamps_model"],
    ]  # fmt: skip
    for command in commands:
        subprocess.run([sys.executable, "-m", "offsetjax", *command], check=True, cwd=tmp_path)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "runs/stamps/metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    assert (tmp_path / "runs/stamps/samples/step_6.png").stat().st_size > 1000
    assert {"unet", "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json"} <= {
        path.name for path in (tmp_path / "runs/stamps_model").iterdir()
    }
