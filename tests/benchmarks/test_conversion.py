"""A model of ε or v is trained on as a flow, plain or mapped, whole or by a LoRA: what each keeps and learns, in small.

    launch/local.sh test tests/benchmarks/test_conversion.py -m slow -s

The measure is one for all: the error of the flow's velocity under plain noise, on pictures that were held out.
"""

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from offsetjax.exporting.export import export
from offsetjax.train import train
from tests.tiny import build_data, quick_compilation, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

BASE_STEPS, STEPS, EVERY = 1200, 240, 40


def _config(data: pathlib.Path, seed: int, **changes: Any) -> Any:
    config = tiny_config(data, seed=seed, train__log_every_steps=100, data__split="train[:75%]")
    config.model.unet.update(block_out_channels=(32,))
    config.model.vae.scaling_factor = 0.0
    config.noise.offset_strength = 0.0
    config.optimizer.update(learning_rate=2e-3, warmup_steps=20, ema_decay=0.98)
    config.train.update(steps=BASE_STEPS, global_batch_size=16)
    config.checkpoint.update(every_steps=BASE_STEPS, max_to_keep=1)
    config.mesh.update(data=1, fsdp=-1)
    config.validation.update(split="train[75%:]", num_examples=64, timesteps=(100, 300, 500, 700, 900, 980))
    config.update_from_flattened_dict({path.replace("__", "."): value for path, value in changes.items()})
    return config


def _curve(workdir: pathlib.Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["validation_plain"] for line in lines if "validation_plain" in line}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_mapped_begins_where_the_model_is_and_plain_begins_anew(prediction_type: str, tmp_path: pathlib.Path) -> None:
    data = build_data(tmp_path, 256)
    with quick_compilation(tmp_path):
        train(_config(data, 0, schedule__prediction_type=prediction_type), tmp_path / "base")
        export(tmp_path / "base", tmp_path / "model")
        curves: dict[str, list[dict[int, float]]] = {}
        for conversion in ("plain", "mapped"):
            for rank in (0, 8):
                name = f"{conversion}, {'LoRA of rank 8' if rank else 'all weights'}"
                for seed in (1, 2):
                    config = _config(
                        data,
                        seed,
                        train__steps=STEPS,
                        model__pretrained=str(tmp_path / "model"),
                        schedule__process="flow",
                        schedule__conversion=conversion,
                        timesteps__density="logit_normal",
                        validation__every_steps=EVERY,
                        lora__rank=rank,
                        optimizer__learning_rate=2e-3 if rank else 1e-3,
                    )
                    train(config, tmp_path / f"{name} {seed}")
                    curves.setdefault(name, []).append(_curve(tmp_path / f"{name} {seed}"))
    steps = sorted(curves["plain, all weights"][0])
    print(f"\n{prediction_type}: error of the velocity after steps {steps}, means over two seeds")
    means = {name: np.mean([[each[step] for step in steps] for each in runs], 0) for name, runs in curves.items()}
    for name, values in means.items():
        print(f"{name:28}" + "".join(f"{value:9.4f}" for value in values))
    for trained in ("all weights", "LoRA of rank 8"):
        plain, mapped = (means[f"{conversion}, {trained}"] for conversion in ("plain", "mapped"))
        assert mapped[0] < 0.8 * plain[0] and mapped[1] < plain[1]
        assert np.isfinite(mapped).all() and mapped[-1] < 1.1 * mapped[0]
