"""A data source, a writer and an optimizer that offsetjax does not know train and resume, through the registries."""

import contextlib
import hashlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optax
import pytest
from etils import epath
from ml_collections import ConfigDict

from offsetjax.data.record import Picture
from offsetjax.data.source import SOURCES, Source
from offsetjax.errors import UserError
from offsetjax.sampling import pictures
from offsetjax.train import train
from offsetjax.training.jsonl import read_log
from offsetjax.training.metrics import WRITERS
from offsetjax.training.optimizer import OPTIMIZERS, Mask, Optimizer
from tests.tiny import quick_compilation, tiny_config


@dataclass(frozen=True)
class Noise:
    """As many pictures of noise as the path says, drawn when they are read; `split` gives the seed."""

    count: int
    split: str

    @property
    def label(self) -> str:
        return f"{self.count} pictures of noise ({self.split})"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Picture:
        seed = int.from_bytes(hashlib.sha256(f"{self.split} {index}".encode()).digest()[:4], "big")
        pixels = np.random.default_rng(seed).integers(0, 256, (20, 16, 3), np.uint8)
        return Picture(pixels, f"noise number {index}")

    def fingerprint(self) -> Mapping[str, Any]:
        return {"count": self.count, "split": self.split}

    def shares_records(self, other: Source) -> bool:
        return isinstance(other, Noise) and self.split == other.split


def open_noise(path: str, split: str) -> Noise:
    return Noise(int(path), split)


class Service:
    """A service that keeps what it is sent."""

    def __init__(self, workdir: epath.Path, start_step: int, num_steps: int):
        self.file = pathlib.Path(workdir) / "service.txt"
        self.scalars(start_step, {"begun": num_steps})

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._send(f"{step} {' '.join(values)}")

    def images(self, step: int, name: str, pictures: Sequence[pictures.Picture], about: Mapping[str, Any]) -> None:
        self._send(f"{step} {name}: {len(pictures)} by {about['sampler']}")

    def close(self) -> None:
        self._send("closed")

    def _send(self, line: str) -> None:
        with self.file.open("a") as file:
            file.write(line + "\n")


def momentum(settings: ConfigDict, num_steps: int, decays: Mask) -> Optimizer:
    """Stochastic gradient descent with momentum, its rate falling to 0."""
    del decays
    rate = optax.linear_schedule(settings.learning_rate, 0.0, num_steps)
    return Optimizer(optax.sgd(rate, momentum=settings.b1), rate)


@pytest.fixture(scope="module", autouse=True)
def registered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    SOURCES.register("noise", open_noise)
    WRITERS.register("service", Service)
    OPTIMIZERS.register("momentum", momentum)
    with quick_compilation(tmp_path_factory.getbasetemp()):
        yield


def _config(**changes: Any) -> ConfigDict:
    stranger = {"data__source": "noise", "optimizer__name": "momentum", "train__writers": ("jsonl", "service")}
    text = {"train__text_encoders": True, "optimizer__text_encoder_learning_rate": 5e-4}
    return tiny_config("12", **(stranger | text | changes))


def _losses(workdir: pathlib.Path) -> list[tuple[int, str, float]]:
    lines = [line for line in read_log(workdir).lines if "loss" in line.values]
    return [(line.step, float(line.values["loss"]).hex(), line.values["learning_rate"]) for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A training that never stopped, with pictures at its end."""
    workdir = tmp_path_factory.mktemp("strangers") / "whole"
    train(_config(sample__every_steps=4, sample__prompts=("noise",)), workdir)
    return workdir


def test_a_training_with_all_three_resumes_with_the_losses_of_one_that_never_stopped(
    whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = _config(sample__prompts=("noise",))

    class StopError(Exception):
        pass

    class Stops(Service):
        def scalars(self, step: int, values: Mapping[str, float]) -> None:
            super().scalars(step, values)
            if step == 3:
                raise KeyboardInterrupt

    WRITERS.register("service", Stops)
    with contextlib.suppress(KeyboardInterrupt):
        train(config, tmp_path / "parts")
    WRITERS.register("service", Service)
    assert [step for step, _, _ in _losses(tmp_path / "parts")] == [1, 2, 3]
    train(config, tmp_path / "parts")
    losses = _losses(whole)
    assert losses == _losses(tmp_path / "parts") and len({loss for _, loss, _ in losses}) == 4
    assert [rate for _, _, rate in losses] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    sent = (whole / "service.txt").read_text().splitlines()
    assert sent[0] == "0 begun" and sent[-1] == "closed" and "4 step_4: 1 by ddim" in sent
    assert "2 begun" in (tmp_path / "parts" / "service.txt").read_text().splitlines()


def test_other_pictures_of_the_source_are_refused_on_resume(whole: pathlib.Path) -> None:
    with pytest.raises(UserError, match="data: count is 11, but the checkpoint was written with 12"):
        train(_config(data__path="11"), whole)
    with pytest.raises(UserError, match=r"validation\.split = 12 pictures of noise \(train\) has pictures of"):
        train(_config(train__steps=6, validation__every_steps=1, validation__split="train"), whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__source": "noize"}, "data.source = 'noize' is not known; did you mean 'noise'?"),
        ({"train__writers": ("json",)}, "made of jsonl, tensorboard, terminal, service; did you mean 'jsonl'?"),
        ({"optimizer__name": "adam"}, "lion, muon, prodigy, sgd, momentum; did you mean 'adamw'?"),
    ],
)
def test_a_name_that_is_not_known_is_refused_before_anything_is_written(
    tmp_path: pathlib.Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as refused:
        train(_config(**changes), tmp_path / "run")
    assert str(refused.value).endswith(message) and not (tmp_path / "run").exists()
