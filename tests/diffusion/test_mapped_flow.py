"""A flow in the terms of a network of ε or v: the same flow, so that what the network knows already is not unlearnt."""

import json
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offsetjax.config import assign, default_config, is_explicit, validate
from offsetjax.diffusion.density import Density
from offsetjax.diffusion.flow import Flow
from offsetjax.diffusion.loss import flow_weight
from offsetjax.diffusion.mapped_flow import MappedFlow
from offsetjax.diffusion.noise import PLAIN, Noise
from offsetjax.diffusion.process import Process, make_process
from offsetjax.diffusion.sampler import NAMES, Name
from offsetjax.diffusion.spread import Drawing, reach
from offsetjax.diffusion.variance_preserving import VariancePreserving, variance_preserving
from offsetjax.errors import UserError
from offsetjax.models.pipeline import build
from offsetjax.models.resolve import resolve
from offsetjax.sampling.reach import brightness_reach, start_in_words
from tests.tiny import tiny_config
from tests.torch_models import save_pipeline
from tests.training.test_objective import _config, _look

PREDICTIONS = ["epsilon", "v_prediction"]
TOLD = np.array([0, 1, 354, 700, 999])


def network(prediction_type: Any) -> VariancePreserving:
    return variance_preserving(1000, 0.00085, 0.012, prediction_type)


def mapped(prediction_type: Any) -> MappedFlow:
    return MappedFlow(Flow(), network(prediction_type), prediction_type == "v_prediction")


def time_of(told: Any) -> Any:
    """The t at which the two have the same σ/α."""
    alpha, sigma = network("epsilon").scales(told)
    return sigma / (alpha + sigma)


def test_the_network_is_told_the_timestep_of_the_same_ratio_in_its_own_scale() -> None:
    process, t = mapped("epsilon"), time_of(TOLD)
    assert t[2] == pytest.approx(0.5, abs=0.001) and t[-1] == pytest.approx(0.936, abs=0.0005)
    np.testing.assert_allclose(process.network_timestep(t), TOLD, atol=1e-9)
    np.testing.assert_allclose(process.scales(t), network("epsilon").scales(TOLD), rtol=1e-12)
    # Fractions in between; beyond both ends, the ends.
    assert 353 < process.network_timestep(np.float64(0.4995)) < 355
    assert process.network_timestep(np.array([0.0, 0.01, 0.95, 1.0])).tolist() == [0.0, 0.0, 999.0, 999.0]
    traced = jax.vmap(process.network_timestep)(jnp.asarray([*t, 0.0, 1.0], jnp.float32))
    np.testing.assert_allclose(traced, [*TOLD, 0, 999], atol=0.02)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_before_any_training_it_is_the_flow_that_the_model_implies(prediction_type: str) -> None:
    """For the exact denoiser of normal data, of power D under noise of power P, whose velocity is known."""
    data, power, process = 3.7, 1.9, mapped(prediction_type)
    for told in TOLD:
        t = float(time_of(told))
        alpha, sigma = network("epsilon").scales(int(told))
        x = 0.8  # x_t of the flow
        own = x / np.hypot(1 - t, t)
        epsilon = sigma * power * own / (alpha**2 * data + sigma**2 * power)
        latent = alpha * data * own / (alpha**2 * data + sigma**2 * power)
        prediction = epsilon if prediction_type == "epsilon" else alpha * epsilon - sigma * latent
        found, noise = process.to_latent_and_noise(own, prediction, np.float64(t))
        velocity = x * (t * power - (1 - t) * data) / ((1 - t) ** 2 * data + t**2 * power)
        assert found == pytest.approx(latent, rel=1e-6) and noise == pytest.approx(epsilon, rel=1e-6)
        assert noise - found == pytest.approx(velocity, rel=1e-6) and (x - found) / t == pytest.approx(
            velocity, rel=1e-6
        )


def test_an_export_says_what_others_programs_return_who_draw_it_by_its_own_schedule() -> None:
    """The flow's grid begins in noise alone, Stable Diffusion's does not."""
    changes = {"schedule__prediction_type": "v_prediction", "sample__sampler": "euler", "sample__num_steps": 28}
    as_base = tiny_config(**changes)
    config = tiny_config(**changes, schedule__process="flow", schedule__conversion="mapped", sample__shift=3.0)
    base, ours, theirs = (
        brightness_reach(build(each), each.sample, each.data.resolution, is_exported=is_exported)
        for each, is_exported in ((as_base, False), (config, False), (config, True))
    )
    assert theirs.matched == base.matched != ours.matched and theirs.plain == base.plain
    said = start_in_words(build(config), config.sample, config.data.resolution, 0)
    assert f"return {theirs.matched:.0%} from the noise of training, and {theirs.plain:.0%} from plain noise" in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"schedule__zero_terminal_snr": True, "sample__sampler": "heun"},
            "sample.sampler = 'heun' cannot be exported with schedule.conversion = 'mapped'",
        ),
        ({"sample__num_steps": 1001, "sample__sampler": "euler"}, "sample.num_steps = 1001 must be at most 1000 with"),
    ],
)
def test_what_its_export_could_not_be_drawn_with_is_refused(changes: dict[str, Any], words: str) -> None:
    config = tiny_config(
        model__pretrained="v",
        schedule__process="flow",
        schedule__conversion="mapped",
        schedule__prediction_type="v_prediction",
        **changes,
    )
    with pytest.raises(UserError, match=re.escape(words)):
        validate(config)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_the_target_stands_for_the_latent_and_within_its_schedule_is_what_it_was_trained_to_predict(
    prediction_type: str,
) -> None:
    process, own = mapped(prediction_type), network(prediction_type)
    latent, noise = np.random.default_rng(0).normal(size=(2, 50))
    for t in (*time_of(TOLD), 0.02, 0.94, 0.99, 1.0):
        alpha, sigma = process.scales(np.float64(t))
        target = process.target(latent, noise, 0.0, np.float64(t))
        found, found_noise = process.to_latent_and_noise(alpha * latent + sigma * noise, target, np.float64(t))
        np.testing.assert_allclose(found, latent, atol=1e-9)
        np.testing.assert_allclose(found_noise, noise, atol=1e-7)
        traced = process.target(jnp.asarray(latent), jnp.asarray(noise), 0.0, jnp.float32(t))
        np.testing.assert_allclose(traced, target, atol=2e-3)
    for told, t in zip(TOLD, time_of(TOLD), strict=True):
        expected = own.target(latent, noise, 0.0, int(told))
        np.testing.assert_allclose(process.target(latent, noise, 0.0, np.float64(t)), expected, atol=1e-6)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_an_error_counts_as_one_of_the_velocity(prediction_type: str) -> None:
    process, error = mapped(prediction_type), 0.3
    for t in (0.03, 0.2, 0.5, 0.9, 0.97, 1.0):
        first, second = (process.to_latent_and_noise(0.4, each, np.float64(t))[0] for each in (0.1, 0.1 + error))
        squared = ((second - first) / t) ** 2
        assert process.weight(np.float64(t)) * error**2 == pytest.approx(squared, rel=1e-9)
        assert (second - first) ** 2 * process.error_gain(np.float64(t)) == pytest.approx(error**2, rel=1e-9)
        np.testing.assert_allclose(jax.jit(process.weight)(jnp.float32(t)), process.weight(np.float64(t)), rtol=1e-4)
        weights = [float(flow_weight(each, jnp.float32(t), "cosmap")) for each in (process, Flow())]
        assert weights[0] == pytest.approx(weights[1], rel=1e-5)
    assert process.weight(np.float64(1e-6)) < 2.0 / time_of(0) ** 2


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_every_sampler_takes_the_path_that_it_takes_in_the_flow(name: Name, prediction_type: str) -> None:
    for noise, shift in ((PLAIN, 1.0), (Noise("offset", np.array([0.1])), 3.0)):
        drawing = Drawing(name, 12, "trailing", shift)
        own, theirs = (
            reach(each, noise, Density("logit_normal"), drawing, 0.6, 64, 64)
            for each in (mapped(prediction_type), Flow())
        )
        for value in ("matched", "plain", "equal", "trained"):
            assert getattr(own, value) == pytest.approx(getattr(theirs, value), rel=1e-6)


def test_the_objective_is_the_flows_for_a_network_of_zeros() -> None:
    """Which predicts ε = 0: x̂0 = x'/α, the worst; at t = 1 its error of the velocity is that of x'/α_T."""
    changes = {"schedule__process": "flow", "schedule__conversion": "mapped", "noise__offset_strength": 0.2}
    seen, flow = _look(_config(**changes)), _look(_config(**{**changes, "schedule__conversion": "plain"}))
    t = np.asarray(flow.timesteps) / 1000
    process = make_process(_config(**changes).schedule)
    assert isinstance(process, MappedFlow)
    np.testing.assert_allclose(seen.timesteps, process.network_timestep(t.astype(np.float64)), atol=0.1)
    scale = np.sqrt(t**2 + (1 - t) ** 2)[:, None, None, None]
    np.testing.assert_allclose(np.asarray(seen.noisy) * scale, flow.noisy, atol=1e-5)
    weight = process.weight(t.astype(np.float64))
    # The latents are nearly 0, so that the noise is the whole target: of n by 1/(1-t)².
    inside = (t > 0.05) & (t < 0.93)
    np.testing.assert_allclose(weight[inside], 1 / (1 - t[inside]) ** 2, rtol=1e-3)
    np.testing.assert_allclose(np.asarray(seen.losses)[inside], (weight * np.asarray(flow.losses))[inside], rtol=2e-3)


def test_what_is_exported_is_a_model_of_its_base() -> None:
    process: Process = mapped("epsilon")
    said = process.scheduler("euler", "trailing", 3.0)
    assert said["_class_name"] == "EulerDiscreteScheduler" and said["prediction_type"] == "epsilon"
    assert process.metadata()["modelspec.prediction_type"] == "epsilon" and "No node" in process.advice(3.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schedule__process": "flow"}, "needs model.pretrained"),
        ({"schedule__process": "flow", "model__pretrained": "x", "noise__kind": "adjusted",
          "noise__offset_strength": 0.1}, "cannot apply to noise.kind = 'adjusted'"),
        ({}, r"schedule\.conversion cannot apply to schedule\.process = 'variance_preserving'"),
    ],
)  # fmt: skip
def test_what_it_does_not_go_with(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        validate(_config(schedule__conversion="mapped", **changes))


def test_the_checkpoint_says_which_terms(tmp_path: pathlib.Path) -> None:
    save_pipeline(tmp_path / "model")
    config = default_config()
    config.model.pretrained = str(tmp_path / "model")
    config.data.resolution, config.noise.offset_strength = 64, 0.1
    config.schedule.update(process="flow", conversion="mapped")
    scheduler = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    said = json.loads(scheduler.read_text())
    for prediction_type in PREDICTIONS:
        scheduler.write_text(json.dumps({**said, "prediction_type": prediction_type, "beta_end": 0.02}))
        resolved = resolve(config)
        assert (resolved.schedule.process, resolved.schedule.prediction_type) == ("flow", prediction_type)
        process = make_process(resolved.schedule)
        assert isinstance(process, MappedFlow) and process.is_velocity == (prediction_type == "v_prediction")
        kept = variance_preserving(1000, 0.00085, 0.02, "epsilon").alphas_cumprod[999]
        assert process.weight(np.float64(1.0)) == pytest.approx(
            (1 - kept) / kept if prediction_type == "epsilon" else 1 - kept
        )
    scheduler.write_text(json.dumps(Flow().scheduler("dpmpp_2m", "trailing", 3.0)))
    with pytest.raises(UserError, match="which is a flow already; leave it out"):
        resolve(config)


def test_a_model_of_v_is_mapped_by_default(tmp_path: pathlib.Path) -> None:
    save_pipeline(tmp_path / "model")
    scheduler = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    said = json.loads(scheduler.read_text())
    cases: list[tuple[str, dict[str, str], str]] = [
        ("v_prediction", {}, "mapped"),
        ("epsilon", {}, "plain"),
        ("v_prediction", {"schedule.conversion": "plain"}, "plain"),
        ("v_prediction", {"noise.kind": "adjusted"}, "plain"),
        ("v_prediction", {"schedule.process": "variance_preserving"}, "plain"),
    ]
    for prediction_type, changes, conversion in cases:
        scheduler.write_text(json.dumps({**said, "prediction_type": prediction_type}))
        config = default_config()
        config.model.pretrained, config.schedule.process = str(tmp_path / "model"), "flow"
        config.data.resolution, config.noise.offset_strength = 64, 0.1
        for path, value in changes.items():
            assign(config, path, value)
        resolved = resolve(config)
        validate(resolved)
        assert resolved.schedule.conversion == conversion
        assert is_explicit(resolved, "schedule.conversion") == ("schedule.conversion" in changes)
