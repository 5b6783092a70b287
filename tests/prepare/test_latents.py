"""A training from cached latents is the one from their pictures, but for the rounding of the cache."""

import contextlib
import json
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from offsetjax.cli import main
from offsetjax.commands.explain import explain
from offsetjax.data.brightness import data_brightness
from offsetjax.data.buckets import Size, square
from offsetjax.data.cache import Shard
from offsetjax.data.images import UnreadableImage
from offsetjax.data.sizes import measured
from offsetjax.data.source import Source, captions, open_source
from offsetjax.errors import UserError
from offsetjax.models.encode import encode_batch, to_unit_range
from offsetjax.models.pipeline import build
from offsetjax.models.task import task_of
from offsetjax.models.trained import load_trained
from offsetjax.models.weights import initial_params, new_tokenizers
from offsetjax.plan.program import architecture, make_program
from offsetjax.prepare import latents
from offsetjax.prepare.calibrate import calibrate
from offsetjax.prepare.latents import encode_data, open_vae
from offsetjax.prepare.modes import measure
from offsetjax.train import train
from offsetjax.training.abstract import abstract_batch, abstract_frozen, abstract_pipeline, model_flops
from offsetjax.training.flops import count_flops
from offsetjax.training.objective import add_position
from offsetjax.training.setup import open_run
from offsetjax.training.streams import batching_of, check_cache, open_buckets, open_stream
from offsetjax.training.validation import make_losses, validate
from tests.data.shapes import COUNT as SHAPES
from tests.data.shapes import pictures_of_shapes
from tests.processes import call_together
from tests.tiny import data_path, quick_compilation, run_config, tiny_config, trained_workdir

COUNT = 16


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    base = tmp_path_factory.getbasetemp()
    with quick_compilation(base):
        yield base


@pytest.fixture(scope="module")
def cache(base: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("latents") / "cache"
    encode_data(tiny_config(data_path(base)), out, shard_size=6)
    return out


@pytest.fixture(scope="module")
def from_latents(cache: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The training of `trained_workdir`, from the cache of its pictures; it draws no samples."""
    workdir = tmp_path_factory.mktemp("latents") / "run"
    train(cached_config(cache), workdir)
    return workdir


def cached_config(cache: pathlib.Path, **changes: Any) -> ConfigDict:
    config = run_config(cache, data__cached_latents=True, sample__every_steps=0, checkpoint__every_steps=4)
    config.update_from_flattened_dict({path.replace("__", "."): value for path, value in changes.items()})
    return config


def lines(workdir: pathlib.Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def opened(base: pathlib.Path, cache: pathlib.Path) -> list[tuple[ConfigDict, Source]]:
    """The config and the data of a training from pictures, and from their latents."""
    configs = [tiny_config(data_path(base)), tiny_config(cache, data__cached_latents=True)]
    return [(each, open_source(each.data.path, each.data.split, each.data.cached_latents)) for each in configs]


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_record_has_the_posterior_of_the_picture_and_of_its_mirror_image(
    base: pathlib.Path, cache: pathlib.Path
) -> None:
    config = tiny_config(data_path(base))
    _, pipeline, params, _ = open_vae(config, open_source(data_path(base)))
    records = list(tfds.builder_from_directory(cache / "latents" / "1.0.0").as_data_source("train"))
    assert [record["name"].decode() for record in records] == [f"{number:03}.png" for number in range(COUNT)]
    folder = base / "tiny data" / "pictures"
    pixels = np.stack([np.asarray(Image.open(folder / record["name"].decode())) for record in records])
    for view, seen in enumerate((pixels, pixels[:, :, ::-1])):
        for kind, values in enumerate(jax.jit(pipeline.autoencoder.encode)(params, to_unit_range(jnp.asarray(seen)))):
            stored = np.stack([record["moments"][view, kind] for record in records])
            assert stored.dtype == np.float16
            np.testing.assert_allclose(stored, values, rtol=2**-10, atol=1e-5)
    views = np.stack([record["moments"] for record in records]).astype(np.float32)
    assert np.abs(views[:, 1] - views[:, 0, ..., ::-1]).max() > 0.01  # why both are there
    brightness = [record["brightness"] for record in records]
    np.testing.assert_allclose(brightness, data_brightness(open_source(data_path(base)), 16), rtol=1e-6)
    np.testing.assert_array_equal(brightness, data_brightness(open_source(cache, "train", True), 16))


def test_the_losses_are_those_of_a_training_from_pictures(base: pathlib.Path, from_latents: pathlib.Path) -> None:
    seen, read = lines(trained_workdir(base)), lines(from_latents)
    assert [line["step"] for line in read] == [line["step"] for line in seen]
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose([line[name] for line in read], [line[name] for line in seen], rtol=2e-3)
        assert [line[name] for line in read] != [line[name] for line in seen]
    trained = load_trained(from_latents)  # as sampling and exporting do
    jax.tree.map(np.testing.assert_array_equal, trained.frozen, load_trained(trained_workdir(base)).frozen)
    assert "vae" in trained.frozen


def test_a_resumed_training_is_the_uninterrupted_one(
    cache: pathlib.Path, from_latents: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(from_latents, workdir)
    shutil.rmtree(workdir / "checkpoints" / "6")
    shutil.copytree(cache, tmp_path / "moved")
    train(cached_config(tmp_path / "moved"), workdir)
    names = ("step", "loss", "grad_norm")
    assert [[line[name] for name in names] for line in lines(workdir)[-2:]] == [
        [line[name] for name in names] for line in lines(from_latents)[-2:]
    ]


def test_the_stream_draws_the_same_batches(base: pathlib.Path, cache: pathlib.Path) -> None:
    """Each batch of the cache is the encoding of the other's pixels, mirrored or not as these are."""
    config, source = opened(base, cache)[0]
    _, pipeline, params, _ = open_vae(config, source)
    encode = jax.jit(lambda pixels: pipeline.autoencoder.encode(params, to_unit_range(pixels)))
    streams = [open_stream(each, pipeline, source).iterator() for each, source in opened(base, cache)]
    for _ in range(4):
        seen, read = (next(stream) for stream in streams)
        np.testing.assert_array_equal(seen["index"], read["index"])
        np.testing.assert_array_equal(seen["time_ids"], read["time_ids"])
        np.testing.assert_allclose(read["moments"][:, 0], encode(seen["pixels"])[0], rtol=2**-10, atol=1e-5)
    for stream in streams:
        stream.close()


def test_validation_and_calibration_agree(base: pathlib.Path, cache: pathlib.Path, from_latents: pathlib.Path) -> None:
    trained = load_trained(from_latents)
    mesh = trained.mesh
    found, measured = [], []
    for config, source in opened(base, cache):
        config.data.random_flip, config.validation.timesteps = False, (500,)
        stream = open_stream(config, trained.pipeline, source)
        frozen = {
            part: params for part, params in trained.frozen.items() if part != "vae" or not config.data.cached_latents
        }
        losses = jax.jit(make_losses(trained.pipeline, config.validation.timesteps, mesh))
        found.append(validate(losses, config.validation, stream, mesh, trained.params, frozen))
        measured.append(measure(batching_of(config), trained.pipeline, trained.frozen["vae"], source, mesh))
    assert found[1] == pytest.approx(found[0], rel=2e-3) and found[1] != found[0]
    for seen, read in zip(*measured, strict=True):  # the means of the modes, and their variances
        np.testing.assert_allclose(read, seen, rtol=5e-3, atol=2e-3 * np.abs(seen).max())


SEVERAL = {"data__buckets": ("16x16", "24x16", "16x24"), "data__max_aspect": 2.0}


@pytest.fixture(scope="module")
def of_shapes(base: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The latents of pictures of several sizes, of which five are left out for their shape."""
    out = tmp_path_factory.mktemp("latents") / "shapes"
    encode_data(tiny_config(pictures_of_shapes(base), **SEVERAL), out, shard_size=12)
    return out


def test_latents_of_several_sizes_come_in_the_batches_of_their_pictures(
    base: pathlib.Path, of_shapes: pathlib.Path
) -> None:
    from_pictures = tiny_config(pictures_of_shapes(base), **SEVERAL)
    from_cache = tiny_config(of_shapes, data__cached_latents=True, **SEVERAL)
    opened = open_source(pictures_of_shapes(base)), open_source(of_shapes, cached_latents=True)
    pipeline = build(from_pictures, new_tokenizers(from_pictures.model, captions(opened[0])))
    params = {
        part: initial_params(from_pictures.model, from_pictures.seed, part, model)
        for part, model in pipeline.parts.items()
    }
    trained, frozen = {"unet": params.pop("unet")}, params
    encode = jax.jit(lambda pixels: pipeline.autoencoder.encode(frozen["vae"], to_unit_range(pixels)))
    losses = [jax.jit(task_of(each).objective(pipeline, each)) for each in (from_pictures, from_cache)]
    shapes: set[tuple[int, ...]] = set()
    with contextlib.ExitStack() as stack:
        streams = [
            stack.enter_context(contextlib.closing(open_stream(each, pipeline, source).iterator()))
            for each, source in zip((from_pictures, from_cache), opened, strict=True)
        ]
        for _ in range(8):
            seen, read = (next(stream) for stream in streams)
            np.testing.assert_array_equal(seen["index"], read["index"])
            np.testing.assert_array_equal(seen["time_ids"], read["time_ids"])
            np.testing.assert_allclose(read["moments"][:, 0], encode(seen["pixels"])[0], rtol=2**-10, atol=1e-5)
            if seen["pixels"].shape == (8, 16, 24, 3) and seen["pixels"].shape not in shapes:  # one program is enough
                found = [
                    loss(
                        trained, frozen, add_position({k: v for k, v in batch.items() if k != "index"}, 8), jnp.int32(3)
                    )
                    for loss, batch in zip(losses, (seen, read), strict=True)
                ]
                np.testing.assert_allclose(*found, rtol=2e-3)
            shapes.add(seen["pixels"].shape)
    assert shapes == {(8, 24, 16, 3), (8, 16, 16, 3), (8, 16, 24, 3)}


def test_a_cache_of_several_sizes_keeps_what_fits_none_in_its_place(
    base: pathlib.Path, of_shapes: pathlib.Path
) -> None:
    source = open_source(of_shapes, cached_latents=True)
    np.testing.assert_array_equal(measured(source), measured(open_source(pictures_of_shapes(base))))
    sizes = [source[index].size for index in range(SHAPES)]
    assert [index for index, size in enumerate(sizes) if size == (0, 0)] == list(range(6, SHAPES, 7))  # 100x10
    assert source[0].views.shape == (2, 2, 4, 8, 8) and source[3].views.shape == (2, 2, 4, 8, 12)
    assert source[6].views.size == 0 and source[6].caption == "6"
    with pytest.raises(UnreadableImage, match="its latents are of 16x16 pixels, not of 24x16"):
        source[0].view(Size(24, 16), False)
    part = open_source(of_shapes, "train[8:15]", cached_latents=True)
    np.testing.assert_array_equal(measured(part), measured(source)[8:15])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {},
            r"has latents of the sizes 16x24, 16x16, 24x16; set data\.buckets=\('16x24', '16x16', '24x16'\), or encode",
        ),
        ({"data__buckets": ("16x16",)}, "has latents of the sizes 16x24, .*, but the config gives 16x16; set"),
        ({**SEVERAL, "data__max_enlargement": 9.0}, r"encoded with data\.max_enlargement = 0, but the config has 9"),
    ],
)
def test_a_cache_of_other_sizes_is_refused(of_shapes: pathlib.Path, changes: dict[str, Any], message: str) -> None:
    config = tiny_config(of_shapes, data__cached_latents=True, **changes)
    source = open_source(of_shapes, cached_latents=True)
    pipeline = build(config)
    with pytest.raises(UserError, match=message) as refused:
        check_cache(config, source, pipeline, initial_params(config.model, config.seed, "vae", pipeline.autoencoder))
    assert "\n" not in str(refused.value)


def test_a_cache_of_several_sizes_is_not_calibrated(of_shapes: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="has latents of several sizes, and a calibration is of squares; give the pict"):
        calibrate(tiny_config(of_shapes, data__cached_latents=True, **SEVERAL), tmp_path / "found.json")


def test_a_cache_of_squares_has_no_other_sizes(cache: pathlib.Path) -> None:
    config = tiny_config(cache, data__cached_latents=True, data__buckets=("16x16",))
    with pytest.raises(UserError, match=r"has latents of squares of 16 px; leave out data\.buckets"):
        open_buckets(config, open_source(cache, cached_latents=True))


def test_standardised_latents_bring_their_statistics(base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    changes = {"model__vae__scaling_factor": 0.0, "data__random_flip": False}
    config = tiny_config(data_path(base), **changes)
    encode_data(config, tmp_path / "cache")
    cached = tiny_config(tmp_path / "cache", data__cached_latents=True, **changes)
    source = open_source(tmp_path / "cache", cached_latents=True)
    means = np.stack([source[index].views[0, 0] for index in range(COUNT)]).astype(np.float32)
    np.testing.assert_allclose(means.mean((0, 2, 3)), 0.0, atol=0.02)
    np.testing.assert_allclose(means.std((0, 2, 3)), 1.0, atol=0.02)
    runs = [
        open_run(each, epath.Path(tmp_path / name), data)
        for each, name, data in ((config, "pictures", open_source(data_path(base))), (cached, "latents", source))
    ]
    assert [run.config.model.vae.scaling_factor for run in runs] == [1.0, 1.0]
    jax.tree.map(np.testing.assert_array_equal, runs[0].frozen, runs[1].frozen)
    open_run(cached, epath.Path(tmp_path / "latents"), source)  # again
    other = tiny_config(tmp_path / "cache", data__cached_latents=True, data__random_flip=False)
    with pytest.raises(UserError, match="has latents of another autoencoder"):
        open_run(other, epath.Path(tmp_path / "other"), source)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__cached_latents": False}, "has the latents of pictures, not the pictures"),
        ({"data__resolution": 32}, "has latents of pictures of 16 px, but data.resolution = 32"),
        ({"seed": 1}, "has latents of another autoencoder"),  # which the seed draws
        ({"model__vae__scaling_factor": 0.0}, r"has latents that are not standardised, .* set it to 1\.0"),
    ],
)
def test_what_does_not_belong_together_is_refused_before_anything_is_written(
    cache: pathlib.Path, tmp_path: pathlib.Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        train(cached_config(cache, **changes), tmp_path / "run")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_reopened_takes_no_latents_of_another_autoencoder(
    cache: pathlib.Path, from_latents: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    shutil.copytree(cache, tmp_path / "cache")
    about = tmp_path / "cache" / "latents" / "1.0.0" / "latents.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "encoder": "0"}))
    with pytest.raises(UserError, match="has latents of another autoencoder, with the checksum 0;"):
        train(cached_config(tmp_path / "cache", train__steps=7), from_latents)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task=autoencoder", "task = 'autoencoder' trains what encodes"),
        ("data.buckets=('16x15',)", "16x15 must be multiples of 2"),
        ("data.cached_latents=True", "reads pictures: give their data.path"),
        ("data.split=test", "has no split 'test'"),
        ("data.split=all", "the splits that 'all' stands for"),
    ],
)
def test_the_command_refuses_what_it_cannot_encode(
    base: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    (tmp_path / "tiny.py").write_text(
        f"from tests.tiny import tiny_config\n\n\ndef get_config():\n    return tiny_config({str(data_path(base))!r}, "
        "noise__offset_strength=0.0)\n"
    )
    arguments = ["data", "encode", f"--config={tmp_path / 'tiny.py'}", f"--out={tmp_path / 'out'}"]
    assert main([*arguments, f"--config.{override}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_interrupted_encoding_goes_on(
    base: pathlib.Path, cache: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, write = [], Shard.write

    def stop(shard: Shard, *arguments: Any) -> None:
        if len(written) == 1:
            raise KeyboardInterrupt
        write(shard, *arguments)
        written.append(shard.first)

    with monkeypatch.context() as patch:
        patch.setattr(Shard, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            encode_data(tiny_config(data_path(base)), tmp_path / "cache", shard_size=6)
    with pytest.raises(UserError, match=r"has an unfinished cache with random_flip = True, but .* give False"):
        encode_data(tiny_config(data_path(base), data__random_flip=False), tmp_path / "cache", shard_size=6)
    encode_data(tiny_config(data_path(base), data__split="train[:5]"), tmp_path / "cache", shard_size=6)
    assert files(tmp_path / "cache") == files(cache)


def test_a_disk_that_does_not_show_what_others_wrote_is_no_mistake_of_the_users(
    base: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(latents, "_SHOWN_SECONDS", 0)
    monkeypatch.setattr(Shard, "write", lambda *_: None)  # by another process, of which nothing is seen
    with pytest.raises(OSError, match="process 0 does not see all") as caught:
        encode_data(tiny_config(data_path(base)), tmp_path / "cache", shard_size=6)
    assert explain(caught.value) == 75
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.undo()
    encode_data(tiny_config(data_path(base)), tmp_path / "cache", shard_size=6)


def test_a_finished_cache_is_left_as_it_is(
    base: pathlib.Path, cache: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = {file: file.stat().st_mtime_ns for file in cache.rglob("*")}
    with caplog.at_level("INFO", logger="offsetjax"):
        found = encode_data(tiny_config(data_path(base)), cache, shard_size=6)
    assert "encoded already; give it as data.path" in caplog.text
    assert found.to_json() == (cache / "latents" / "1.0.0" / "latents.json").read_text()
    with pytest.raises(UserError, match=r"has a finished cache with random_flip = True, but .* give False"):
        encode_data(tiny_config(data_path(base), data__random_flip=False), cache, shard_size=6)
    assert {file: file.stat().st_mtime_ns for file in cache.rglob("*")} == before


def test_a_place_that_processes_do_not_share_is_refused(
    base: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latents.caches, "begin", lambda out, cache, sizes: None)  # as if another process did, elsewhere
    monkeypatch.setattr(latents, "_SHOWN_SECONDS", 0)
    with pytest.raises(UserError, match=r"does not see the cache .* give as --out a place that all") as refused:
        encode_data(tiny_config(data_path(base)), tmp_path / "cache")
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_several_processes_encode_shards_of_their_own(
    base: pathlib.Path, cache: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    call = (_encode, str(data_path(base)), str(tmp_path / "cache"))
    shares = call_together([call, call], num_devices=1)
    assert sorted(shares) == [[0, 12], [6]]
    sources = [open_source(each, "train", cached_latents=True) for each in (tmp_path / "cache", cache)]
    for one, other in ((source[index] for source in sources) for index in range(COUNT)):
        np.testing.assert_allclose(one.views, other.views, rtol=2**-9, atol=1e-5)
        np.testing.assert_array_equal(one.time_ids, other.time_ids)
        about = ("mean_brightness", "caption", "name")
        assert [getattr(one, name) for name in about] == [getattr(other, name) for name in about]


def _encode(pictures: str, out: str) -> list[int]:
    written, write = [], Shard.write

    def note(shard: Shard, *arguments: Any) -> None:
        write(shard, *arguments)
        written.append(shard.first)

    Shard.write = note  # type: ignore[method-assign]
    encode_data(tiny_config(pictures), out, shard_size=6)
    assert "tensorflow" not in sys.modules
    return written


def test_the_step_is_planned_without_the_autoencoder(base: pathlib.Path, cache: pathlib.Path) -> None:
    plain, cached = tiny_config(), tiny_config(data__cached_latents=True)
    pipeline = abstract_pipeline(plain)
    program = make_program(architecture(cached), jax.devices()[:2])
    assert set(program.arguments[1]) == {"text_encoder"}
    assert program.step.trace(*program.arguments).out_info[0].step.shape == ()
    keys = jax.random.split(jax.random.key(0), cached.train.global_batch_size)
    encode = lambda params, batch: encode_batch(pipeline.autoencoder, params, batch, keys)  # noqa: E731
    encoding = count_flops(
        encode,
        abstract_frozen(pipeline)["vae"],
        abstract_batch(pipeline, square(plain.data.resolution), plain.train.global_batch_size),
    )
    assert model_flops(plain, pipeline) - model_flops(cached, pipeline) == encoding > 0
    config, source = opened(base, cache)[1]
    with contextlib.closing(open_stream(config, build(config), source).iterator()) as batches:
        batch = next(batches)
    for name, expected in abstract_batch(pipeline, square(config.data.resolution), len(batch["index"]), True).items():
        if name != "input_ids":  # without a tokenizer there are none
            assert (batch[name].shape, batch[name].dtype) == (expected.shape, expected.dtype)
