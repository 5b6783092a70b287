"""What is learned: the noise with its offset, drawn from streams of its own, and weighted example by example.

The networks are stand-ins whose outputs the test chooses, so that every draw can be read off: an encoder that returns
given moments, a text encoder that returns the ids, a denoiser that returns its parameters p. The loss is then the mean
of (p - n)² over N elements, whose gradient at p = 0 is -2 n / N: it gives the target n, exactly if N is a power of two.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from offsetjax.config import default_config
from offsetjax.diffusion.process import make_process
from offsetjax.models.family import Tokens
from offsetjax.models.pipeline import Pipeline, noising_of
from offsetjax.models.stable_diffusion import SD1
from offsetjax.models.task import task_of
from offsetjax.rng import stream_key
from offsetjax.training.objective import add_position
from tests.tiny import quick_compilation

EMPTY = np.zeros(3, np.int32)
LATENT = (4, 4, 4)
MANY = 1 << 17  # the correlation of independent draws has a standard deviation of 0.003


@pytest.fixture(scope="module", autouse=True)
def _quickly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with quick_compilation(tmp_path_factory.getbasetemp()):
        yield


@dataclass(frozen=True)
class StandInEncoder:
    """Moments are the parameters; pictures have latents of any shape."""

    scaling_factor: float = 1.0
    downscale: int = 8

    def encode(self, params: Any, pixels: jax.Array) -> Any:
        return params


@dataclass(frozen=True)
class StandInTextEncoder:
    def apply(self, params: Any, input_ids: jax.Array) -> tuple[jax.Array, None]:
        return input_ids, None


@dataclass(frozen=True)
class StandInUNet:
    """Predicts its parameters, and notes what it was given."""

    given: list[tuple[jax.Array, ...]] = field(default_factory=list)

    def apply(self, params: Any, noisy: jax.Array, timesteps: jax.Array, encoder_hidden_states: jax.Array) -> jax.Array:
        self.given.append((noisy, timesteps, encoder_hidden_states))
        return params


@dataclass(frozen=True)
class StandInPipeline(Pipeline):
    def tokens(self, caption: str) -> Tokens:
        assert caption == ""
        return Tokens({"text_encoder": EMPTY}, 2, len(EMPTY))


def stand_in(config: ConfigDict, vae: Any = StandInEncoder()) -> Pipeline:
    """Stable Diffusion 1.x of stand-ins."""
    parts = {"unet": StandInUNet(), "vae": vae, "text_encoder": StandInTextEncoder()}
    return StandInPipeline(SD1, parts, noising_of(config, downscale=8), {"force_zeros_for_empty_prompt": False})


@dataclass(frozen=True)
class Seen:
    """All that one batch draws."""

    losses: jax.Array
    target: jax.Array
    noisy: jax.Array
    timesteps: jax.Array
    input_ids: jax.Array


def _config(**changes: Any) -> ConfigDict:
    config = default_config()
    config.update_from_flattened_dict({path.replace("__", "."): value for path, value in changes.items()})
    return config


def _look(
    config: ConfigDict, count: int = 256, shape: tuple[int, ...] = LATENT, step: int = 0, log_variance: float = -60.0
) -> Seen:
    pipeline = stand_in(config)
    objective = task_of(config).objective(pipeline, config)
    frozen = {"vae": (jnp.zeros((count, *shape)), jnp.full((count, *shape), log_variance)), "text_encoder": None}
    pixels, ids = jnp.zeros((count, 2, 2, 3), jnp.uint8), {"text_encoder": jnp.ones((count, 3), jnp.int32)}
    batch = add_position({"pixels": pixels, "input_ids": ids, "time_ids": jnp.zeros((count, 6))}, count)
    prediction = jnp.zeros((count, *shape))

    def total(prediction: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses = objective({"unet": prediction}, frozen, batch, jnp.int32(step))
        return losses.sum(), losses

    gradient, losses = jax.grad(total, has_aux=True)(prediction)
    noisy, timesteps, hidden = pipeline.denoiser.given[0]
    return Seen(losses, -gradient * np.prod(shape) / 2, noisy, timesteps, hidden)


def test_each_size_has_its_own_shift_and_an_example_is_noised_as_it_is_alone() -> None:
    flow = {"schedule__process": "flow", "schedule__shift": 2.0, "schedule__shift_rule": "resolution"}
    config = _config(**flow, schedule__shift_resolution=64, noise__offset_strength=0.1, sample__spacing="trailing")
    square, wide = _look(config, 16, (4, 8, 8)), _look(config, 16, (4, 8, 16))
    odds = [np.asarray(seen.timesteps) / (1000 - np.asarray(seen.timesteps)) for seen in (square, wide)]
    np.testing.assert_allclose(odds[1] / odds[0], np.sqrt(2), rtol=1e-3)  # of twice the pixels
    alone = _look(config, 1, (4, 8, 16))
    np.testing.assert_allclose(alone.noisy, wide.noisy[:1], rtol=1e-6)
    np.testing.assert_allclose(alone.losses, wide.losses[:1], rtol=1e-6)


def test_the_target_is_the_noise_with_its_offset() -> None:
    strength = 0.5
    plain, offset = (_look(_config(noise__offset_strength=c)) for c in (0.0, strength))
    shift = np.asarray(offset.target - plain.target)
    # The same for all pixels of a channel, independent between channels and examples, of deviation c.
    assert np.abs(shift - shift[..., :1, :1]).max() < 1e-6
    assert shift[..., 0, 0].std() == pytest.approx(strength, rel=0.1)
    assert np.abs(np.corrcoef(shift[..., 0, 0].T) - np.eye(4)).max() < 0.25
    # And it is what the latents are noised with: where nearly no signal is left, they are the target.
    late = np.asarray(offset.timesteps) > 900
    assert late.any()
    assert np.asarray(offset.noisy)[late] == pytest.approx(np.asarray(offset.target)[late], rel=0.02, abs=0.02)


def test_the_variance_of_a_channels_mean_is_that_of_offset_noise() -> None:
    strength, pixels = 0.3, 16
    means = np.asarray(_look(_config(noise__offset_strength=strength)).target).mean((2, 3))
    assert means.var() == pytest.approx(1 / pixels + strength**2, rel=0.12)  # N. Guttenberg 2023: (1 + c² N) / N


def test_a_strength_for_a_reference_resolution_keeps_the_snr_of_the_mean() -> None:
    """Latents of 16 pixels are pictures of 32 px here, where 1/64 + .4² of 64 px is less the larger 1/16."""
    fixed = _look(_config(noise__offset_strength=(0.4**2 + 1 / 64 - 1 / 16) ** 0.5))
    scaled = _look(_config(noise__offset_strength=0.4, noise__reference_resolution=64))
    assert np.asarray(scaled.target) == pytest.approx(np.asarray(fixed.target), abs=1e-6)


def test_strength_0_is_plain_training_bit_for_bit() -> None:
    seen = _look(_config(noise__offset_strength=0.0))
    keys = jax.vmap(lambda i: jax.random.fold_in(stream_key(0, "noise", 0), i))(jnp.arange(256))
    plain = jax.vmap(lambda key: jax.random.normal(jax.random.split(key)[0], LATENT))(keys)
    assert jnp.array_equal(seen.target, plain)
    assert jnp.array_equal(seen.losses, jax.vmap(lambda n: jnp.mean(jnp.square(0.0 - n)))(plain))


def test_the_offset_changes_nothing_else_that_is_drawn() -> None:
    plain, offset = (_look(_config(noise__offset_strength=c)) for c in (0.0, 0.1))
    assert jnp.array_equal(plain.timesteps, offset.timesteps)
    assert jnp.array_equal(plain.input_ids, offset.input_ids)


def test_the_draws_of_one_example_are_uncorrelated() -> None:
    seen = _look(_config(encode__caption_dropout=0.5), MANY, (1, 1, 1), log_variance=0.0)
    noise = np.asarray(seen.target).ravel()
    signal, sigma = make_process(default_config().schedule).scales(seen.timesteps)
    early = np.asarray(signal) > 0.5  # later the latent cannot be told from rounding
    latent = (np.asarray(seen.noisy).ravel() - np.asarray(sigma) * noise) / np.asarray(signal)
    dropped = np.asarray(seen.input_ids)[:, 0] == 0
    draws = [noise, np.asarray(seen.timesteps), dropped]
    assert np.abs(np.corrcoef(draws) - np.eye(3)).max() < 0.01
    assert early.sum() > 50_000
    assert latent[early].std() == pytest.approx(1.0, abs=0.01)
    among_early = np.corrcoef([latent[early], *(np.asarray(draw)[early] for draw in draws)])
    assert np.abs(among_early - np.eye(4))[0].max() < 0.01


def test_another_step_draws_anew_and_the_same_step_the_same() -> None:
    config = _config(noise__offset_strength=0.1)
    first, again, second = (_look(config, step=step) for step in (5, 5, 6))
    assert jnp.array_equal(first.target, again.target)
    assert jnp.array_equal(first.timesteps, again.timesteps)
    assert abs(np.corrcoef(np.ravel(first.target), np.ravel(second.target))[0, 1]) < 0.03
    assert not jnp.array_equal(first.timesteps, second.timesteps)


def test_time_steps_are_uniform_from_the_first_to_the_last() -> None:
    timesteps = np.asarray(_look(_config(), MANY, (1, 1, 1)).timesteps)
    assert (timesteps.min(), timesteps.max()) == (0, 999)
    assert timesteps.mean() == pytest.approx(499.5, abs=4.0)


def test_time_steps_begin_at_the_least_that_is_asked_for() -> None:
    timesteps = np.asarray(_look(_config(loss__min_timestep=600), MANY, (1, 1, 1)).timesteps)
    assert (timesteps.min(), timesteps.max()) == (600, 999)
    assert timesteps.mean() == pytest.approx(799.5, abs=2.0)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_the_share_of_captions_is_dropped_whole(share: float) -> None:
    ids = np.asarray(_look(_config(encode__caption_dropout=share), MANY, (1, 1, 1)).input_ids)
    assert set(map(tuple, ids)) <= {(0, 0, 0), (1, 1, 1)}
    assert (ids[:, 0] == 0).mean() == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weighs_each_example_by_its_time_step(prediction_type: str) -> None:
    plain, weighted = (
        _look(_config(schedule__prediction_type=prediction_type, loss__min_snr_gamma=gamma)) for gamma in (0.0, 5.0)
    )
    # T. Hang et al., arXiv 2303.09556: min(SNR, 5) of an error of x0; in ε that is / SNR, in v / (SNR + 1).
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = np.cumprod(1 - betas)[np.asarray(plain.timesteps)]
    snr = kept / (1 - kept)
    expected = np.minimum(snr, 5.0) / (snr if prediction_type == "epsilon" else snr + 1)
    assert np.asarray(weighted.losses / plain.losses) == pytest.approx(expected, rel=1e-4)


def test_v_is_the_target_of_v_prediction() -> None:
    epsilon, v = (
        _look(_config(schedule__prediction_type=kind, noise__offset_strength=0.2), log_variance=0.0)
        for kind in ("epsilon", "v_prediction")
    )
    # T. Salimans and J. Ho, arXiv 2202.00512: x = cos φ x0 + sin φ n, v = cos φ n - sin φ x0; so cos φ v = n - sin φ x.
    signal, sigma = (
        np.asarray(scale)[:, None, None, None] for scale in make_process(default_config().schedule).scales(v.timesteps)
    )
    noise = np.asarray(epsilon.target)
    assert signal * np.asarray(v.target) == pytest.approx(noise - sigma * np.asarray(v.noisy), abs=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_there_is_one_loss_an_example_also_in_a_batch_of_one(count: int) -> None:
    seen = _look(_config(noise__offset_strength=0.1), count)
    assert seen.losses.shape == (count,)
    assert seen.noisy.shape == (count, *LATENT)


def test_an_example_is_drawn_the_same_in_any_batch() -> None:
    config = _config(noise__offset_strength=0.1)
    small, large = (_look(config, count) for count in (3, 256))
    assert jnp.array_equal(small.target, large.target[:3])
    assert jnp.array_equal(small.timesteps, large.timesteps[:3])


def test_the_autoencoders_objective_is_error_and_divergence() -> None:
    @dataclass(frozen=True)
    class Reconstruction:
        def encode(self, params: Any, pixels: jax.Array) -> Any:
            return jnp.full((2, 1, 2, 2), 3.0), jnp.full((2, 1, 2, 2), -60.0)

        def decode(self, params: Any, latents: jax.Array) -> jax.Array:
            return jnp.full((2, 3, 4, 4), 0.5) + 0.0 * latents.mean()

    pixels = jnp.stack([jnp.zeros((4, 4, 3), jnp.uint8), jnp.full((4, 4, 3), 255, jnp.uint8)])
    batch = add_position({"pixels": pixels}, 2)
    config = _config(task="autoencoder", loss__kl_weight=0.01)
    objective = task_of(config).objective(stand_in(config, Reconstruction()), config)
    losses = objective({"vae": None}, {}, batch, jnp.int32(0))
    divergence = (9.0 + 0.0 + 60.0 - 1.0) / 2  # of N(3, e^-60) from N(0, 1), in nats
    assert np.asarray(losses) == pytest.approx([1.5**2 + 0.01 * divergence, 0.5**2 + 0.01 * divergence], rel=1e-5)


def test_the_task_chooses_the_objective() -> None:
    configs = {task: _config(task=task) for task in ("diffusion", "autoencoder")}
    names = {task: task_of(each).objective(stand_in(each), each).__qualname__ for task, each in configs.items()}
    assert all(name.startswith(f"{task}_objective") for task, name in names.items())
