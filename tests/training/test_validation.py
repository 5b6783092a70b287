"""Validation losses compare: they depend on the weights alone, whatever noise, seed, batch or mesh the training has."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from offsetjax.data.brightness import compare, data_brightness
from offsetjax.data.buckets import Limits, Size
from offsetjax.data.sizes import once_each
from offsetjax.data.source import open_source
from offsetjax.diffusion.noise import offset_noise
from offsetjax.errors import UserError
from offsetjax.models.encode import to_unit_range
from offsetjax.models.frozen import load_frozen, read_tokenizers
from offsetjax.models.pipeline import Pipeline, build
from offsetjax.models.stable_diffusion import SD1
from offsetjax.parallel.sharding import mesh_of, shardings
from offsetjax.rng import stream_key
from offsetjax.sampling.pictures import Picture
from offsetjax.sampling.sample import Sampler, sample_workdir
from offsetjax.train import train
from offsetjax.training.evaluators import open_evaluators, validation_batching
from offsetjax.training.setup import Run
from offsetjax.training.step import TrainState
from offsetjax.training.streams import batching_of, open_stream, stream_of
from offsetjax.training.validation import check_apart, make_losses, validate
from tests.data.shapes import pictures_of_shapes
from tests.tiny import RESOLUTION, data_path, quick_compilation, run_config, tiny_config, trained_workdir

TIMESTEPS = (100, 999)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    base = tmp_path_factory.getbasetemp()
    with quick_compilation(base):
        yield base


def _parts(base: pathlib.Path, config: ConfigDict, mesh: Mesh) -> tuple[Pipeline, PyTree]:
    """The pipeline and the frozen parts of a finished training."""
    folder = trained_workdir(base) / "frozen"
    pipeline = build(config, read_tokenizers(folder, SD1))
    return pipeline, load_frozen(folder, pipeline, partial(shardings, mesh, pipeline.sharding))


def _validate(base: pathlib.Path, *, fsdp: int = 1, step: int = 0, **changes: Any) -> dict[str, float]:
    """The losses of one fixed model on 5 pictures."""
    settings = {"validation__num_examples": 5, "validation__timesteps": TIMESTEPS, "data__random_flip": False}
    config = tiny_config(data_path(base), **settings, **changes)
    mesh = mesh_of(data=2 if fsdp > 1 else 1, fsdp=fsdp)
    pipeline, frozen = _parts(base, config, mesh)
    params = {"unet": jax.jit(pipeline.denoiser.init)(jax.random.key(3))}
    stream = stream_of(dataclasses.replace(batching_of(config), seed=0), pipeline, open_source(config.data.path))
    losses = jax.jit(make_losses(pipeline, config.validation.timesteps, mesh))
    return validate(losses, config.validation, stream, mesh, params, frozen, step)


@pytest.fixture(scope="module")
def plain(base: pathlib.Path) -> dict[str, float]:
    return _validate(base, noise__offset_strength=0.0)


def test_a_plain_training_has_one_curve(plain: dict[str, float]) -> None:
    assert set(plain) == {"validation_plain", "validation_plain_t100", "validation_plain_t999"}
    assert plain["validation_plain"] == pytest.approx(
        (plain["validation_plain_t100"] + plain["validation_plain_t999"]) / 2
    )


@pytest.mark.parametrize(
    "noise",
    [
        {"noise__offset_strength": 0.5},
        {"noise__kind": "pyramid", "noise__pyramid_discount": 0.8, "noise__pyramid_levels": 4},
        {"noise__offset_strength": 0.0, "noise__input_perturbation": 0.5},
        {"loss__min_snr_gamma": 1.0, "loss__min_timestep": 900},
    ],
)
def test_no_offset_gets_into_the_plain_curve(
    base: pathlib.Path, plain: dict[str, float], noise: dict[str, Any]
) -> None:
    seen = _validate(base, **{"noise__offset_strength": 0.0, **noise})
    assert {name: seen[name] for name in plain} == plain
    training = {name for name in seen if name.startswith("validation_training")}
    assert bool(training) == (noise.get("noise__offset_strength", 0) > 0 or "noise__kind" in noise)
    if training:
        assert seen["validation_training"] != plain["validation_plain"]


def test_the_training_curve_ends_in_the_plain_one_where_the_noise_becomes_plain(base: pathlib.Path) -> None:
    annealed = {"noise__offset_strength": 0.5, "noise__anneal": 0.5, "train__steps": 100}
    end = _validate(base, step=100, **annealed)
    for timestep in ("", *(f"_t{each}" for each in TIMESTEPS)):
        assert end[f"validation_training{timestep}"] == pytest.approx(end[f"validation_plain{timestep}"], rel=1e-5)


@pytest.mark.parametrize(
    "other", [{"train__global_batch_size": 2}, {"train__global_batch_size": 16}, {"seed": 7}, {"fsdp": 4}]
)
def test_the_losses_do_not_depend_on_how_they_are_computed(
    base: pathlib.Path, plain: dict[str, float], other: dict[str, Any]
) -> None:
    assert _validate(base, noise__offset_strength=0.0, **other) == pytest.approx(plain, rel=2e-5)


@dataclass(frozen=True)
class PredictsNothing:
    has_added_conditions: bool = False

    def apply(self, params: Any, noisy: jax.Array, timesteps: jax.Array, **conditions: Any) -> jax.Array:
        return jnp.zeros_like(noisy)


def test_the_losses_are_unweighted_errors_of_the_noise_that_they_name(base: pathlib.Path) -> None:
    """Where nothing is predicted, the loss is the variance of the noise: 1, and 1 + c² with an offset."""
    settings = {"noise__offset_strength": 2.0, "loss__min_snr_gamma": 5.0, "validation__num_examples": 16}
    config = tiny_config(data_path(base), **settings, validation__timesteps=tuple(range(0, 1000, 50)))
    mesh = mesh_of(data=1, fsdp=1)
    pipeline, frozen = _parts(base, config, mesh)
    pipeline = dataclasses.replace(pipeline, parts={**pipeline.parts, "unet": PredictsNothing()})
    stream = open_stream(config, pipeline, open_source(config.data.path))
    losses = jax.jit(make_losses(pipeline, config.validation.timesteps))
    seen = validate(losses, config.validation, stream, mesh, {"unet": None}, frozen)
    assert seen["validation_plain"] == pytest.approx(1.0, abs=0.03)
    assert seen["validation_training"] == pytest.approx(1 + 2.0**2, rel=0.15)  # 1,280 shifts


@dataclass(frozen=True)
class PredictsItsInput:
    """Times what it is told of t."""

    has_added_conditions: bool = False

    def apply(self, params: Any, noisy: jax.Array, timesteps: jax.Array, **conditions: Any) -> jax.Array:
        return noisy * timesteps[:, None, None, None] / 1000


@pytest.mark.parametrize("other", [{}, {"seed": 7, "train__global_batch_size": 4, "noise__offset_strength": 0.5}])
def test_a_flows_validation_is_the_error_of_the_velocity_by_hand(base: pathlib.Path, other: dict[str, Any]) -> None:
    """Fixed t, fixed noise: whatever the run's seed, batch and own noise, `plain` is the same."""
    count, strength = 5, other.get("noise__offset_strength", 0.25)
    config = tiny_config(
        data_path(base),
        **{"schedule__process": "flow", "noise__offset_strength": strength, "data__random_flip": False, **other},
        validation__num_examples=count,
        validation__timesteps=TIMESTEPS,
    )
    mesh = mesh_of(data=1, fsdp=1)
    pipeline, frozen = _parts(base, config, mesh)
    pipeline = dataclasses.replace(pipeline, parts={**pipeline.parts, "unet": PredictsItsInput()})
    config.seed = 0  # as evaluators do
    stream = open_stream(config, pipeline, open_source(config.data.path))
    losses = jax.jit(make_losses(pipeline, config.validation.timesteps))
    seen = validate(losses, config.validation, stream, mesh, {"unet": None}, frozen)
    batches, pixels = stream.iterator(), []
    while sum(map(len, pixels)) < count:
        pixels.append(next(batches)["pixels"])
    latents = pipeline.autoencoder.encode(frozen["vae"], to_unit_range(np.concatenate(pixels)[:count]))[0]
    latents = np.asarray(latents * pipeline.autoencoder.scaling_factor, np.float64)
    for number in TIMESTEPS:
        t = number / 1000
        keys = [jax.random.fold_in(stream_key(0, "validation", number), place) for place in range(count)]
        for name, offset in (("plain", 0.0), ("training", strength)):
            noise = np.stack([offset_noise(key, jnp.zeros(latents.shape[1:]), offset) for key in keys])
            noisy = (1 - t) * latents + t * noise
            error = np.square(t * noisy - (noise - latents)).mean()
            assert seen[f"validation_{name}_t{number}"] == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize(
    ("training", "held_out", "is_apart"),
    [
        ("train[:75%]", "train[75%:]", True),
        ("train[:4]+train[8:12]", "train[4:8]", True),
        ("train", "train[75%:]", False),
        ("train[:13]", "train[12:]", False),
    ],
)
def test_a_hold_out_shares_no_picture_with_the_training(
    base: pathlib.Path, training: str, held_out: str, is_apart: bool
) -> None:
    sources = [open_source(data_path(base), split) for split in (training, held_out)]
    if is_apart:
        check_apart(*sources)
    else:
        with pytest.raises(UserError, match=r"validation\.split = .* has pictures of data\.split"):
            check_apart(*sources)


def test_a_run_logs_its_validation_and_its_probe(base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = run_config(data_path(base), train__steps=2, sample__every_steps=0, data__split="train[:50%]")
    config.validation.update(every_steps=1, split="train[50%:]", num_examples=3, timesteps=TIMESTEPS)
    config.probe.update(every_steps=2, prompts=("", "a white square"), seeds_per_prompt=3)
    train(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    validated = [line for line in lines if "validation_plain" in line]
    assert [line["step"] for line in validated] == [0, 1, 2]
    assert all(np.isfinite(line["validation_training_t999"]) for line in validated)
    assert len({line["validation_plain"] for line in validated}) == 3, "the weights change, and so must the losses"
    probed = [line for line in lines if "brightness_mean" in line]
    assert [line["step"] for line in probed] == [0, 2]
    records = json.loads((tmp_path / "run" / "samples" / "probe_2.json").read_text())["records"]
    drawn = [record["brightness"] for record in records]
    assert len(drawn) == 6
    assert probed[1]["brightness_mean"] == pytest.approx(np.mean(drawn), abs=1e-5)
    assert probed[1]["brightness_std"] == pytest.approx(np.std(drawn), abs=1e-5)
    data = data_brightness(open_source(data_path(base), "train[:50%]"), RESOLUTION)
    assert probed[1]["brightness_wasserstein"] == pytest.approx(compare(drawn, data)["wasserstein"], abs=1e-5)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]


def test_a_run_that_dies_while_it_looks_looks_again_when_it_resumes(
    base: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(data_path(base), train__steps=2, sample__every_steps=0, data__split="train[:50%]")
    config.validation.update(every_steps=2, split="train[50%:]", num_examples=3, timesteps=TIMESTEPS)
    looks = []

    def dies_at_the_second(*arguments: Any) -> dict[str, float]:
        looks.append(arguments)
        if len(looks) == 2:
            raise KeyboardInterrupt
        return validate(*arguments)

    monkeypatch.setattr("offsetjax.training.evaluators.validate", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run")
    train(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation_plain" in line][-1] == 2


def test_a_validation_shows_each_picture_once_at_the_sizes_that_are_trained(base: pathlib.Path) -> None:
    config = tiny_config(pictures_of_shapes(base), validation__timesteps=(5,), validation__num_examples=11)
    source, limits = open_source(config.data.path), Limits(max_aspect=2.0)
    sizes = {Size(16, 16): 4, Size(24, 16): 2, Size(16, 24): 4}
    buckets, plan = once_each(source, sizes, limits, 11)
    shown = np.concatenate(plan.groups)
    assert len(set(shown.tolist())) == 11 and 6 not in shown % 7  # 100x10
    assert [
        (size, plan.batch(number).size, plan.size_of(number)) for number, (size, _) in enumerate(plan.batches())
    ] == [(size, size, size) for size, _ in plan.batches()]
    assert sum(count for _, count in plan.batches()) == 11
    again, _ = once_each(source, dict.fromkeys(sizes, 8), limits, 11)
    np.testing.assert_array_equal(shown, np.concatenate(again.plan.groups))

    places = list[int]()

    def sums(params: Any, frozen: Any, batch: Any, first: Any, end: Any, step: Any) -> dict[str, Any]:
        pixels = np.asarray(batch["pixels"])
        values, at = pixels[:, pixels.shape[1] // 2, 0, 0].astype(float), int(first) + np.arange(len(pixels))
        places.extend(at[at < int(end)].tolist())
        return {"plain": np.array([values[at < int(end)].sum()])}

    batching = dataclasses.replace(validation_batching(batching_of(config), 1), global_batch_size=4)
    stream = stream_of(batching, build(config), source, None, buckets)
    found = validate(sums, config.validation, stream, mesh_of(data=1, fsdp=1), None, None)
    assert places == list(range(11)), "whatever the batches are, for they decide on the draws"
    assert found["validation_plain"] == found["validation_plain_t5"] == pytest.approx((7 * shown + 1).mean())
    for size, group in zip(buckets.sizes, plan.groups, strict=True):
        assert found[f"validation_plain_{size}"] == pytest.approx((7 * group + 1).mean())
    with pytest.raises(UserError, match=r"no picture of .* fits any of the sizes 16x16; see"):
        once_each(source, {Size(16, 16): 4}, Limits(max_enlargement=0.1), 11)


def test_validations_compare_whatever_sizes_are_trained() -> None:
    changes: dict[str, Any] = {"data__buckets": ("16x16", "24x16"), "seed": 7, "train__accumulate_steps": 2}
    found = validation_batching(batching_of(tiny_config(**changes)), 2)
    assert found == validation_batching(batching_of(tiny_config(data__bucket_count=3)), 2)
    assert (found.random_flip, found.seed, found.global_batch_size) == (False, 0, 4)


def test_a_probe_has_the_same_starts_in_runs_of_any_seed(base: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the sample grids move the start's brightness."""
    seen = []

    def draw(sampler: Sampler, *_: Any) -> list[Picture]:
        seen.append((sampler.seed, sampler.brightness))
        return [Picture("", 0, np.zeros((2, 2, 3), np.uint8))]

    monkeypatch.setattr("offsetjax.training.evaluators.draw_pictures", draw)
    config = run_config(data_path(base), seed=7, sample__brightness=(1.0,), sample__every_steps=0)
    config.probe.every_steps = 1
    mesh = mesh_of(data=1, fsdp=1)
    run = Run(config, epath.Path("run"), mesh, *_parts(base, tiny_config(data_path(base)), mesh))
    source = open_source(config.data.path)
    [evaluator] = open_evaluators(run, source)
    params = {"w": jnp.zeros(1)}
    found = evaluator.evaluate(
        TrainState(jnp.int32(0), params, None, params, jnp.int32(0), jnp.uint32(0), jnp.uint32(0)), 0
    )
    assert seen == [(0, ())]
    assert [len(pictures) for pictures in found.images.values()] == [1] and found.images.keys() == {"probe_0"}
    assert found.scalars["brightness_wasserstein"] == pytest.approx(data_brightness(source, 16).mean())


def test_a_flows_probe_draws_what_sampling_draws_of_the_same_seeds(base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Of a flow trained with offset noise, from the start that matches it."""
    config = run_config(
        data_path(base), train__steps=1, sample__every_steps=0, schedule__process="flow", schedule__shift=2.0,
        timesteps__density="logit_normal", sample__sampler="euler", noise__offset_strength=0.5,
    )  # fmt: skip
    config.probe.update(every_steps=1, prompts=("a white square",), seeds_per_prompt=2)
    train(config, tmp_path / "run")
    probed = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    probed = [line for line in probed if "brightness_mean" in line]
    assert [line["step"] for line in probed] == [0, 1]
    record = json.loads((tmp_path / "run" / "samples" / "probe_1.json").read_text())
    sample_workdir(epath.Path(tmp_path / "run"), epath.Path(tmp_path), ["a white square"], range(2), name="drawn")
    drawn = json.loads((tmp_path / "drawn.json").read_text())
    assert record["start_noise"] == drawn["start_noise"] == "matched"
    found, expected = ([each["brightness"] for each in every["records"]] for every in (record, drawn))
    np.testing.assert_allclose(found, expected, atol=1e-5)
