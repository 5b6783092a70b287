"""A model of each family, from others' file to the picture that PyTorch draws: trained, resumed, exported."""

import dataclasses
import functools
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
from etils import epath
from jaxtyping import PyTree
from ml_collections import ConfigDict

from offsetjax.config import default_config
from offsetjax.exporting.export import export
from offsetjax.formats.pretrained import open_pretrained
from offsetjax.models.family import family_of
from offsetjax.models.trained import load_trained
from offsetjax.models.weights import abstract_trained, initial_trained
from offsetjax.parallel import sharding
from offsetjax.sampling.sample import pixel_sampler
from offsetjax.storage import checkpoint
from offsetjax.train import train
from offsetjax.training.setup import open_run
from tests import families, tiny
from tests.exporting.test_round_trip import imported

PROMPTS = ("a black square", "a green hill")
STEPS = 2
RATES = {"learning_rate": 1e-3, "text_encoder_learning_rate": 2e-4}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained, from what."""

    family: str
    is_shallow: bool = False  # two blocks rather than four, which compile in a fraction of the time
    is_single_file: bool = True
    learns_text: bool = False

    @property
    def resolution(self) -> int:
        return 32 if self.is_shallow else 64

    def config(self) -> ConfigDict:
        """The architecture."""
        config = families.narrow_config(self.family)
        if self.is_shallow:
            config.model.unet.update(
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                block_out_channels=(64, 128),
                transformer_layers_per_block=(1, 1),
                layers_per_block=1,
            )
            if self.family == "sd2":
                config.model.unet.attention_head_dim = (1, 2)
            config.model.vae.update(
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                block_out_channels=(32, 64),
                layers_per_block=1,
            )
        return config

    @property
    def text(self) -> tuple[str, ...]:
        """Its text encoders."""
        return family_of(self.config().model).encoders


# The 23 layers that a text encoder of Stable Diffusion 2 has in the single file's layout take minutes to compile.
QUICK = Case("sd1", is_shallow=True, learns_text=True)
CASES = (
    QUICK,
    Case("sd1", is_single_file=False),
    Case("sd2", is_shallow=True, learns_text=True),
    Case("sd2"),
    Case("sdxl", learns_text=True),
)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished training, and what it began with."""

    case: Case
    directory: pathlib.Path  # as PyTorch wrote it
    start: pathlib.Path  # what the training read: the directory, or one file
    config: ConfigDict
    workdir: pathlib.Path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    folder = tmp_path_factory.mktemp("family training")
    families.build_data(folder)
    with tiny.quick_compilation(folder):
        yield folder


@pytest.fixture(scope="module")
def train_case(base: pathlib.Path) -> Callable[[Case], Trained]:
    """The training of a case, once for the tests of this file; they must leave it as it is."""

    @functools.cache
    def trained(case: Case) -> Trained:
        folder = base / repr(case)
        directory = start = folder / "model"
        families.pipeline(case.config()).save_pretrained(directory)
        if case.is_single_file:
            start = folder / "model.safetensors"
            export(imported(directory, folder / "import"), start, form="single_file")
        config = default_config()
        config.data.path, config.data.resolution = str(base / "data"), case.resolution
        config.model.pretrained, config.model.dtype = str(start), "float32"
        config.train.update(steps=STEPS, global_batch_size=len(families.SIZES), log_every_steps=1)
        config.noise.offset_strength = 0.1
        config.optimizer.update(warmup_steps=0, weight_decay=0.0, ema_decay=0.5, learning_rate=RATES["learning_rate"])
        if case.learns_text:
            config.train.text_encoders = True
            config.optimizer.update(RATES)
        config.checkpoint.every_steps, config.sample.every_steps = 1, 0
        train(config, folder / "run")
        return Trained(case, directory, start, config, folder / "run")

    return trained


@pytest.fixture(
    params=[pytest.param(case, marks=() if case is QUICK else pytest.mark.slow, id=case.family) for case in CASES]
)
def trained(request: pytest.FixtureRequest, train_case: Callable[[Case], Trained]) -> Trained:
    return train_case(request.param)


def lines_of(workdir: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def record(workdir: pathlib.Path) -> list[tuple[Any, ...]]:
    """What each step computed, in hex, and the captions that were cut since the first."""
    names = ("loss", "grad_norm", "learning_rate", "captions_truncated")
    return [(line["step"], *(float(line[name]).hex() for name in names)) for line in lines_of(workdir)]


def checksums(workdir: pathlib.Path, step: int) -> dict[str, int]:
    """Of every array of a checkpoint."""
    with checkpoint.open_checkpoints(workdir) as manager:
        return json.loads((manager.directory / str(step) / "data" / "metadata").read_text())["checksums"]


def weights(model: pathlib.Path, part: str) -> dict[str, bytes]:
    return {name: tensor().tobytes() for name, tensor in open_pretrained(model).tensors(part).items()}


def flat(tree: PyTree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


@functools.cache
def draw(workdir: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Our pictures of a training, [b, h, w, 3] in [0, 1], and the latents that they start from."""
    model = load_trained(workdir)
    model.config.sample.update(num_steps=4, guidance_scale=3.0)
    start = np.array(tiny.start_of(model.pipeline, model.config, jax.random.split(jax.random.key(5), len(PROMPTS))))
    ids, negative = model.pipeline.tokenize(PROMPTS), model.pipeline.tokens("").input_ids
    draw = pixel_sampler(model.pipeline, model.config.sample, model.config.data.resolution)
    pixels = jax.jit(draw)(model.params, model.frozen, ids, negative, start)
    return np.transpose(pixels, (0, 2, 3, 1)), start


def draw_in_pytorch(pipeline: diffusers.DiffusionPipeline, start: np.ndarray, resolution: int) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    size = {"height": resolution, "width": resolution}
    latents = torch.from_numpy(start)
    return pipeline(
        list(PROMPTS), latents=latents, num_inference_steps=4, guidance_scale=3.0, output_type="np", **size
    ).images


def test_a_resumed_training_computes_what_an_uninterrupted_one_does(
    trained: Trained, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without what it began with: all that it needs is in its work directory."""
    workdir = tmp_path / "resumed"
    shutil.copytree(trained.workdir, workdir)
    for step in range(2, STEPS + 1):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    config = trained.config.copy_and_resolve_references()
    config.model.pretrained = str(tmp_path / "gone")
    with caplog.at_level("WARNING", "offsetjax"):
        train(config, workdir)
    assert record(workdir) == record(trained.workdir)
    assert [line["captions_truncated"] for line in lines_of(workdir)] == list(range(1, STEPS + 1))
    assert f"{STEPS} captions were longer than the text encoders read, and cut" in caplog.text
    assert checksums(workdir, STEPS) == checksums(trained.workdir, STEPS)
    assert all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines_of(workdir))


@pytest.mark.parametrize("form", ["diffusers", "single_file"])
def test_pytorch_draws_our_picture_with_the_exported_model(form: str, trained: Trained, tmp_path: pathlib.Path) -> None:
    out = tmp_path / ("model" if form == "diffusers" else "model.safetensors")
    export(trained.workdir, out, form=form)
    kind = diffusers.StableDiffusionXLPipeline if trained.case.family == "sdxl" else diffusers.StableDiffusionPipeline
    options = {"add_watermarker": False} if trained.case.family == "sdxl" else {"safety_checker": None}
    if form == "diffusers":
        pipeline = kind.from_pretrained(out, **options)
    else:
        pipeline = kind.from_single_file(out, config=str(trained.directory), local_files_only=True, **options)
    ours, start = draw(trained.workdir)
    theirs = draw_in_pytorch(pipeline, start, trained.case.resolution)
    before = draw_in_pytorch(kind.from_pretrained(trained.directory, **options), start, trained.case.resolution)
    assert theirs.std() > 0.05, "the picture is flat: nothing is compared"
    assert np.abs(theirs - before).max() > 0.02, "training changed nothing: nothing is compared"
    difference = np.abs(ours - theirs).max()
    print(f"{trained.case.family}, {form}: largest difference of two pictures {difference:.1e}")
    assert difference <= 1e-3


def test_what_is_not_trained_stays_as_it_came(trained: Trained, tmp_path: pathlib.Path) -> None:
    export(trained.workdir, tmp_path / "model")
    frozen = {"vae", *(() if trained.case.learns_text else trained.case.text)}
    kept = {folder.name for folder in (trained.workdir / "frozen").iterdir() if (folder / "config.json").exists()}
    assert kept == frozen
    for part in frozen:
        expected = weights(trained.directory, part)
        [file] = (trained.workdir / "frozen" / part).glob("*.safetensors")
        stored = {name: array.tobytes() for name, array in safetensors.numpy.load_file(file).items()}
        assert stored == expected
        assert weights(tmp_path / "model", part) == expected
    for part in {"unet", "vae", *trained.case.text} - frozen:
        assert weights(tmp_path / "model", part) != weights(trained.directory, part)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case is QUICK else pytest.mark.slow) for case in CASES if case.learns_text]
)
def test_text_encoders_learn_at_their_own_rate(case: Case, train_case: Callable[[Case], Trained]) -> None:
    """Adam's first step is as long as the learning rate wherever there is a gradient, whatever its size."""
    trained = train_case(case)
    run = open_run(trained.config, epath.Path(trained.workdir), source=None)
    place = sharding.shardings(run.mesh, run.pipeline.sharding, abstract_trained(run.pipeline, run.config.lora))
    begin = flat(initial_trained(run.pipeline, run.config.model, run.config.lora, run.config.seed, place))
    after = flat(load_trained(trained.workdir, 1, "raw").params)
    assert begin.keys() == after.keys()
    steps: dict[str, list[np.ndarray]] = {"unet": [], **{part: [] for part in case.text}}
    for name, leaf in after.items():
        if name.endswith("kernel"):  # embeddings of words that no caption has learn nothing
            steps[name.partition("/")[0]].append(np.abs(leaf - begin[name]).ravel())
    for part, each in steps.items():
        rate = RATES["learning_rate" if part == "unet" else "text_encoder_learning_rate"]
        lengths = np.concatenate(each) / rate
        assert lengths.max() == pytest.approx(1.0, rel=1e-3), part
        # SDXL reads its first encoder before the last layer, which has no gradient.
        assert np.median(lengths[lengths > 0]) == pytest.approx(1.0, rel=1e-3), part
        assert (lengths > 0).mean() > 0.4, part
