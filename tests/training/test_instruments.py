"""What a training tells of its machine: compilations, traces, and the share of the peak that it reaches."""

import json
import logging
import pathlib
import shutil
from collections.abc import Iterator
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from offsetjax.parallel.chips import CHIPS
from offsetjax.train import train
from offsetjax.training import instruments
from offsetjax.training.abstract import abstract_pipeline, model_flops
from offsetjax.training.flops import count_flops
from offsetjax.training.goodput import Goodput
from offsetjax.training.instruments import Instruments, compilation_cache, ideal_seconds
from offsetjax.training.metrics import StepClock
from tests.compilation import usual_compilation
from tests.tiny import data_path, tiny_config


@pytest.fixture(scope="module", autouse=True)
def _cache_of_its_own() -> Iterator[None]:
    """Not that of all tests: a training's is looked at."""
    with usual_compilation():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def resumed(base: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, str]:
    """A run that was stopped after two steps and resumed, with a trace of the rest, and what it logged."""
    workdir = tmp_path_factory.mktemp("resumed") / "run"
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("offsetjax")
    log.addHandler(handler)
    before = log.level
    log.setLevel(logging.INFO)
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        train(tiny_config(data_path(base)), workdir)
        shutil.rmtree(workdir / "checkpoints" / "4")
        jax.clear_caches()  # as in another process
        train(tiny_config(data_path(base), train__profile_steps=(2, 4)), workdir)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
        log.removeHandler(handler)
        log.setLevel(before)
    return workdir, "\n".join(lines)


def test_the_step_is_compiled_once_and_found_again(resumed: tuple[pathlib.Path, str]) -> None:
    workdir, log = resumed
    assert log.count("the step was compiled in") == 1
    assert log.count("the step was read from the compilation cache in") == 1
    assert any((workdir / "compiled").iterdir())
    assert jax.config.values["jax_compilation_cache_dir"] is None


def test_a_trace_can_be_opened_and_holds_the_step(resumed: tuple[pathlib.Path, str]) -> None:
    workdir, log = resumed
    (file,) = (workdir / "profile").rglob("*.xplane.pb")
    assert file.parent.parent == workdir / "profile" / "plugins" / "profile"  # where xprof looks for it
    data = jax.profiler.ProfileData.from_file(str(file))
    names = {event.name for plane in data.planes for line in plane.lines for event in line.events}
    assert any("train_step" in name for name in names)
    assert f"steps 3 to 4 are traced in {workdir}/profile" in log  # it resumes after the second
    assert "nothing is traced" not in log


def test_a_trace_of_steps_that_are_over_is_told_once(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    told = []
    for steps, begin in (((20, 24), 25), ((20, 24), 24), ((), 25)):
        Instruments(epath.Path(tmp_path), steps, jax.devices(), begin).close()
        told += [record.getMessage() for record in caplog.records]
        caplog.clear()
    assert told == ["train.profile_steps = (20, 24): nothing is traced, for the run resumes at step 25"]
    assert not (tmp_path / "profile").exists()


def test_a_trace_that_is_cut_short_says_how_far_it_reached(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "offsetjax")
    watched = Instruments(epath.Path(tmp_path), (2, 9), jax.devices())
    for step in (1, 2, 3):
        watched.before(step)
        watched.after(step, {})
    watched.close()  # as when SIGTERM came
    assert f"steps 2 to 3 are traced in {tmp_path}/profile" in caplog.text


def test_a_cpu_has_no_peak_and_no_mfu(resumed: tuple[pathlib.Path, str]) -> None:
    lines = [json.loads(line) for line in (resumed[0] / "metrics.jsonl").read_text().splitlines()]
    assert all("images_per_second" in line and "mfu" not in line for line in lines)


def test_another_cache_is_left_in_its_place(tmp_path: pathlib.Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    try:
        with compilation_cache(tmp_path / "run"):
            assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "mine")
        assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "mine")
    finally:
        jax.config.update("jax_compilation_cache_dir", None)


def test_a_second_compilation_of_the_step_is_told(tmp_path: pathlib.Path) -> None:
    def train_step(x: jax.Array) -> jax.Array:
        return x + 1

    step, watched = jax.jit(train_step), Instruments(epath.Path(tmp_path), (), jax.devices())
    try:
        step(jnp.zeros(3))
        step(jnp.ones(3))
        jax.jit(lambda x: x * 2)(jnp.zeros(4))  # another's compilation does not count
        with pytest.warns(RuntimeWarning, match="compiled 2 times"):
            step(jnp.zeros(4))
    finally:
        watched.close()
    step(jnp.zeros(5))  # nobody listens any more


def test_memory_is_told_where_devices_know_it(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    def device(peak: float) -> SimpleNamespace:
        return SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": peak * 2**30, "bytes_limit": 16 * 2**30})

    caplog.set_level(logging.INFO, "offsetjax")
    for devices in ([device(3.0), device(5.25)], jax.local_devices()):
        watched = Instruments(epath.Path(tmp_path), (), devices)
        for step in (1, 2):
            watched.after(step, {})
        watched.close()
    told = [record.getMessage() for record in caplog.records]
    assert told == ["memory: at most 5.25 of 16.00 GiB on each of 2 devices of this process"]


def test_mfu_is_the_share_of_the_peak(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    config = tiny_config()
    pipeline = abstract_pipeline(config)
    flops = model_flops(config, pipeline)
    h100 = SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")
    ideal = ideal_seconds(lambda: model_flops(config, pipeline), [h100] * 4)
    assert ideal == pytest.approx(flops / (4 * 989e12))
    assert ideal_seconds(lambda: model_flops(config, pipeline), jax.devices()) is None

    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = StepClock(0, 8, Goodput(tmp_path), ideal_seconds=0.3)
    now[0] = 4.0
    assert clock.lap(2)["mfu"] == pytest.approx(0.15)  # two steps of 2 s
    now[0] = 0.0
    clock = StepClock(0, lambda step: 8 * step, Goodput(tmp_path), ideal_seconds=lambda step: 0.1 * step)
    now[0] = 6.0
    first = clock.lap(3)
    assert (first["mfu"], first["images_per_second"]) == pytest.approx((0.1, 8.0))  # 8 + 16 + 24 in 6 s
    now[0] = 7.0
    assert clock.lap(4)["images_per_second"] == pytest.approx(32.0)


def test_model_flops_are_proportional_to_the_batch_and_three_times_a_forward_pass() -> None:
    config = tiny_config(train__global_batch_size=2)
    pipeline = abstract_pipeline(config)
    larger = tiny_config(train__global_batch_size=6)
    assert 3 * model_flops(config, pipeline) == pytest.approx(model_flops(larger, pipeline), rel=1e-3)

    unet = pipeline.denoiser
    params = jax.eval_shape(unet.init, jax.random.key(0))
    arguments = params, jnp.zeros((2, 4, 8, 8)), jnp.zeros(2, jnp.int32), jnp.zeros((2, 8, 16))
    forward = count_flops(unet.apply, *arguments)
    both = count_flops(jax.grad(lambda *each: (unet.apply(*each) ** 2).sum()), *arguments)
    assert 2.5 * forward < both < 3 * forward  # the first layer's input has no gradient
    assert both < model_flops(config, pipeline)  # and the frozen parts run forward


def test_the_flops_of_adapters_are_counted_with_the_base_that_they_adapt() -> None:
    whole, adapted = tiny_config(), tiny_config(lora__rank=2)
    flops, of_adapters = (model_flops(each, abstract_pipeline(each)) for each in (whole, adapted))
    assert 2 / 3 * flops < of_adapters < 1.2 * flops  # the products of the base, and those of the adapters beside them


def test_every_known_chip_has_a_name_of_its_own_and_its_figures() -> None:
    assert len({chip.device_kind for chip in CHIPS}) == len(CHIPS)
    for chip in CHIPS:
        assert 1e14 < chip.peak_flops < 1e16
        assert 5e11 < chip.hbm_bandwidth < 1e13
        if chip.name:
            assert chip.examples and all(example.startswith(f"{chip.name}:") for example in chip.examples)
    assert instruments.chip_of("cpu") is None
