"""The learning rate at its landmarks, clipping, and what the optimizer sees."""

import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import PyTree
from ml_collections import ConfigDict

from offsetjax.config import default_config
from offsetjax.models.pipeline import build
from offsetjax.models.weights import abstract_params
from offsetjax.training.optimizer import make_optimizer
from tests import families, tiny
from tests.tiny import update_of


def _config(**optimizer: object) -> ConfigDict:
    config = default_config()
    config.train.steps = 1100
    config.optimizer.update(learning_rate=1e-3, warmup_steps=100, **optimizer)
    return config


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("cosine", {100: 1e-3, 600: 5e-4, 350: 5e-4 * (1 + math.sqrt(0.5)), 1100: 0.0}),
        ("linear", {100: 1e-3, 600: 5e-4, 350: 7.5e-4, 1100: 0.0}),
        ("constant", {100: 1e-3, 600: 1e-3, 1100: 1e-3, 5000: 1e-3}),
    ],
)
def test_the_learning_rate_at_its_landmarks(decay: str, expected: dict[int, float]) -> None:
    rate = make_optimizer(_config(decay=decay).optimizer, 1100).learning_rate
    for step, value in {0: 1e-5 * 1.0, 50: 1e-5 + 0.5 * (1e-3 - 1e-5), **expected}.items():
        assert float(rate(step)) == pytest.approx(value, rel=1e-4, abs=1e-10), step


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
def test_without_a_warm_up_the_first_step_has_the_full_rate(decay: str) -> None:
    config = _config(decay=decay)
    config.optimizer.warmup_steps = 0
    assert float(make_optimizer(config.optimizer, config.train.steps).learning_rate(0)) == pytest.approx(1e-3)


def test_every_step_of_a_run_shorter_than_its_warm_up_moves() -> None:
    config = _config()
    config.train.steps = 10
    rate = make_optimizer(config.optimizer, config.train.steps).learning_rate
    rates = [float(rate(step)) for step in range(10)]
    assert min(rates) > 0
    assert rates == sorted(rates)


def test_a_large_gradient_is_clipped_to_the_norm_and_a_small_one_is_left_alone() -> None:
    config = _config(max_grad_norm=1.0)
    optimizer, params = make_optimizer(config.optimizer, config.train.steps).transform, {"w": jnp.zeros(4)}

    def first_moment(gradient: jax.Array) -> np.ndarray:
        _, state = optimizer.update({"w": gradient}, optimizer.init(params), params)
        [moment] = [
            leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state) if ".mu" in jax.tree_util.keystr(path)
        ]
        return np.asarray(moment) / (1 - config.optimizer.b1)  # the mean of one gradient is the gradient

    assert first_moment(jnp.full(4, 50.0)) == pytest.approx(np.full(4, 0.5), rel=1e-5)  # of norm 1
    assert first_moment(jnp.full(4, 0.1)) == pytest.approx(np.full(4, 0.1), rel=1e-5)


def test_one_step_is_adamws() -> None:
    config = _config(decay="constant", weight_decay=0.1, b1=0.8, b2=0.9, eps=1e-3)
    config.optimizer.warmup_steps = 0
    weight, gradient = np.float64(2.0), np.float64(0.5)
    optimizer, params = make_optimizer(config.optimizer, config.train.steps).transform, {"w": jnp.float32(weight)}
    updates, _ = optimizer.update({"w": jnp.float32(gradient)}, optimizer.init(params), params)
    # I. Loshchilov and F. Hutter, arXiv 1711.05101, algorithm 2, at t = 1: both corrected moments are exact.
    expected = weight - 1e-3 * (gradient / (abs(gradient) + 1e-3) + 0.1 * weight)
    assert float(optax.apply_updates(params, updates)["w"]) == pytest.approx(expected, rel=1e-6)


def test_the_optimizer_holds_two_moments_of_the_trained_parameters_and_nothing_else() -> None:
    params = {"conv": {"kernel": jnp.zeros((3, 5)), "bias": jnp.zeros(5)}}
    leaves = jax.tree.leaves(make_optimizer(_config().optimizer, 1100).transform.init(params))
    assert sorted(leaf.shape for leaf in leaves) == sorted([(), (), (3, 5), (3, 5), (5,), (5,)])


@pytest.mark.parametrize(("rate", "length"), [(0.0, 1e-3), (2e-4, 2e-4)])
def test_text_encoders_learn_at_their_rate_or_at_the_denoisers(rate: float, length: float) -> None:
    """Adam's first step is as long as the learning rate."""
    config = _config(text_encoder_learning_rate=rate, weight_decay=0.0, max_grad_norm=10.0)
    config.train.text_encoders, config.optimizer.warmup_steps = True, 0
    params = {"unet": {"w": jnp.ones(())}, "text_encoder": {"w": jnp.ones(())}}
    transform = make_optimizer(config.optimizer, config.train.steps, encoders=("text_encoder",)).transform
    updates, _ = transform.update(params, transform.init(params), params)
    assert float(updates["unet"]["w"]) == pytest.approx(-1e-3, rel=1e-5)
    assert float(updates["text_encoder"]["w"]) == pytest.approx(-length, rel=1e-5)


def test_what_sdxl_does_not_read_of_its_first_text_encoder_stays_as_it_is(tmp_path: pathlib.Path) -> None:
    """Weight decay alone would change it."""
    config = families.narrow_config("sdxl")
    config.train.text_encoders = True
    config.optimizer.update(weight_decay=0.1, warmup_steps=0, text_encoder_learning_rate=1e-3)
    for part in ("text_encoder", "text_encoder_2"):
        config.model[part].update(vocab_size=8, max_position_embeddings=8)
    config.model.text_encoder_2.num_hidden_layers = 1
    pipeline = build(config)
    encoders = {part: pipeline.parts[part] for part in pipeline.family.encoders}
    rng = np.random.default_rng(0)
    params = {
        part: jax.tree.map(lambda like: rng.normal(size=like.shape).astype(like.dtype), abstract_params(model))
        for part, model in encoders.items()
    }

    def loss(params: PyTree) -> jax.Array:
        told = [model.apply(params[part], jnp.arange(8)[None]) for part, model in encoders.items()]
        return sum((leaf**2).sum() for leaf in jax.tree.leaves(told))

    optimizer = update_of(config).optimizer.transform
    with tiny.quick_compilation(tmp_path):
        gradients = jax.jit(jax.grad(loss))(params)
        updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")

    def zeros(tree: PyTree) -> set[str]:
        names = {name(path) for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if not leaf.any()}
        # The softmax takes no notice of the keys' bias: its gradient is 0 up to rounding.
        return {name for name in names if not name.endswith("k_proj/bias")}

    assert {path.split("/")[0] for path in zeros(gradients)} == {"text_encoder"}
    assert zeros(updates) == zeros(gradients)
