"""Each optimizer is what its paper says, reads what it is given, and learns; each schedule at its landmarks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from etils import epath
from ml_collections import ConfigDict

from offsetjax.config import default_config, validate
from offsetjax.config.registries import OPTIMIZERS
from offsetjax.errors import UserError
from offsetjax.training.optimizer import make_optimizer
from offsetjax.training.schedules import learning_rate
from offsetjax.training.setup import reopened
from tests.tiny import data_path, run_config, trained_workdir

NAMES = ("adamw", "adafactor", "dadapt_adamw", "lion", "muon", "prodigy", "sgd")
FIND_THEIR_RATE = ("dadapt_adamw", "prodigy")
STEPS = 200


def _settings(**changes: Any) -> ConfigDict:
    config = default_config()
    config.optimizer.update(warmup_steps=0, decay="constant", max_grad_norm=1e6, weight_decay=0.0)
    config.optimizer.update(changes)
    config.train.steps = STEPS
    validate(config)
    return config.optimizer


def _params() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {"unet": {"dense": {"kernel": draw(128, 130), "bias": draw(130)}, "conv": {"kernel": draw(3, 3, 2, 4)}}}


def _loss(params: Any) -> jax.Array:
    return sum(jnp.square(leaf - 0.5).sum() for leaf in jax.tree.leaves(params))


def _trained(settings: ConfigDict, steps: int = STEPS, **kwargs: Any) -> tuple[Any, Any]:
    transform = make_optimizer(settings, steps, **kwargs).transform

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = transform.update(jax.grad(_loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = _params()
    state = transform.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def test_every_optimizer_of_ours_is_tried() -> None:
    assert set(OPTIMIZERS._own) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_learns(name: str) -> None:
    rate = {"adafactor": 0.02, "sgd": 0.02, "lion": 0.01, "muon": 0.1}.get(
        name, 1.0 if name in FIND_THEIR_RATE else 0.02
    )
    params, _ = _trained(_settings(name=name, learning_rate=rate))
    assert float(_loss(params)) < 0.1 * float(_loss(_params()))


@pytest.mark.parametrize("name", NAMES)
def test_what_no_loss_reads_keeps_its_weights(name: str) -> None:
    """A decay alone would change them."""
    settings = _settings(name=name, learning_rate=0.01, weight_decay=0.1)
    transform = make_optimizer(settings, 5, unread=("unet/conv",)).transform
    params = _params()
    gradients = jax.grad(_loss)(params)
    gradients["unet"]["conv"] = jax.tree.map(jnp.zeros_like, gradients["unet"]["conv"])
    updates, _ = transform.update(gradients, transform.init(params), params)
    assert not updates["unet"]["conv"]["kernel"].any()
    assert updates["unet"]["dense"]["kernel"].any()


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "muon", "adafactor"])
def test_a_decay_is_the_rate_times_the_weights(name: str) -> None:
    params, rate, decay = _params(), 0.01, 0.3
    gradients = jax.grad(_loss)(params)
    found = []
    for weight_decay in (0.0, decay):
        transform = make_optimizer(_settings(name=name, learning_rate=rate, weight_decay=weight_decay), 5).transform
        updates, _ = transform.update(gradients, transform.init(params), params)
        found.append(updates)
    jax.tree.map(
        lambda plain, decayed, weights: np.testing.assert_allclose(plain - decayed, rate * decay * weights, atol=1e-6),
        *found,
        params,
    )


def _in_torch(name: str, settings: ConfigDict, steps: int) -> np.ndarray:
    weight = torch.nn.Parameter(torch.from_numpy(np.array(_params()["unet"]["dense"]["kernel"])))
    betas = (settings.b1, settings.b2)
    optimizer = {
        "adamw": lambda: torch.optim.AdamW(
            [weight], settings.learning_rate, betas, settings.eps, weight_decay=settings.weight_decay
        ),
        "sgd": lambda: torch.optim.SGD([weight], settings.learning_rate, momentum=settings.b1),
    }[name]()
    for _ in range(steps):
        optimizer.zero_grad()
        ((weight - 0.5) ** 2).sum().backward()
        optimizer.step()
    return weight.detach().numpy()


@pytest.mark.parametrize(
    ("name", "changes"),
    [("adamw", {"weight_decay": 0.1, "b1": 0.8, "b2": 0.9}), ("sgd", {"b1": 0.7}), ("sgd", {"b1": 0.0})],
)
def test_it_is_pytorchs(name: str, changes: dict[str, Any]) -> None:
    settings = _settings(name=name, learning_rate=0.01, **changes)
    params, _ = _trained(settings, 10)
    np.testing.assert_allclose(params["unet"]["dense"]["kernel"], _in_torch(name, settings, 10), atol=1e-5)


def test_lions_updates_are_signs_and_adafactor_keeps_rows_and_columns() -> None:
    params, gradients = _params(), jax.grad(_loss)(_params())
    lion = make_optimizer(_settings(name="lion", learning_rate=0.01), 5).transform
    updates, _ = lion.update(gradients, lion.init(params), params)
    kernel = gradients["unet"]["dense"]["kernel"]
    np.testing.assert_allclose(updates["unet"]["dense"]["kernel"], -0.01 * np.sign(kernel), rtol=1e-6)
    adafactor = make_optimizer(_settings(name="adafactor", learning_rate=0.01), 5).transform
    held = sum(leaf.size for leaf in jax.tree.leaves(adafactor.init(params)))
    assert held < 0.1 * sum(leaf.size for leaf in jax.tree.leaves(params))


def test_muons_update_of_a_kernel_is_orthogonal_and_that_of_a_bias_adams() -> None:
    params, gradients = _params(), jax.grad(_loss)(_params())
    transform = make_optimizer(_settings(name="muon", learning_rate=0.01), 5).transform
    updates, _ = transform.update(gradients, transform.init(params), params)
    given, values = (np.linalg.svd(each["unet"]["dense"]["kernel"], compute_uv=False) for each in (gradients, updates))
    assert given.max() > 50 * given.min()
    assert values.max() < 4 * values.min()
    rms = float(jnp.sqrt(jnp.square(updates["unet"]["dense"]["kernel"]).mean()))
    assert rms == pytest.approx(0.2 * 0.01, rel=0.3)
    convolution = np.linalg.svd(updates["unet"]["conv"]["kernel"].reshape(-1, 4), compute_uv=False)
    assert convolution.max() < 4 * convolution.min()
    # Adam's first step is as long for every number, whatever its gradient; Muon's adds Nesterov's part.
    bias, moved = gradients["unet"]["dense"]["bias"], np.asarray(updates["unet"]["dense"]["bias"])
    nesterov = 1 + 0.9 * 0.1 / (1 - 0.9**2)
    np.testing.assert_allclose(moved, -0.01 * nesterov * np.sign(bias), rtol=1e-3)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "muon"])
def test_the_average_may_be_held_in_bfloat16(name: str) -> None:
    sizes = []
    for dtype in ("float32", "bfloat16"):
        settings = _settings(name=name, learning_rate=0.01, moment_dtype=dtype)
        params, state = _trained(settings, 20)
        sizes.append(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
        assert float(_loss(params)) < float(_loss(_params()))
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(_params()))
    assert sizes[0] - sizes[1] == pytest.approx(parameters / 2, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "sgd", "b2": 0.9}, r"optimizer\.b2 = 0\.9 cannot apply to optimizer\.name = 'sgd'"),
        ({"name": "lion", "eps": 1e-6}, r"optimizer\.eps = 1e-06 cannot apply to optimizer\.name = 'lion'"),
        ({"name": "prodigy", "moment_dtype": "bfloat16"}, r"moment_dtype = 'bfloat16' cannot apply .*'prodigy'"),
        ({"name": "adafactor", "b1": 0.5}, r"optimizer\.b1 = 0\.5 cannot apply to optimizer\.name = 'adafactor'"),
        ({"decay_power": 2.0}, r"decay_power = 2\.0 cannot apply to optimizer\.decay = 'constant'"),
        ({"decay": "cosine", "decay_cycles": 2}, r"decay_cycles = 2 cannot apply to optimizer\.decay = 'cosine'"),
        ({"decay": "inverse_sqrt", "decay_end": 0.1}, r"decay_end = 0\.1 cannot apply to .*'inverse_sqrt'"),
        ({"decay": "cosine", "decay_from": STEPS}, r"decay_from = 200 must be below train\.steps = 200"),
        ({"decay_from": 10}, r"decay_from cannot apply to optimizer\.decay = 'constant' without a warm-up"),
        ({"name": "AdamW"}, r"did you mean 'adamw'"),
    ],
)
def test_a_setting_that_is_not_read_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _settings(**changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"decay": "polynomial", "decay_power": 2.0}, {0: 1.0, 50: 0.5625, 100: 0.25, 200: 0.0}),
        ({"decay": "linear", "decay_end": 0.2}, {0: 1.0, 100: 0.6, 200: 0.2, 500: 0.2}),
        ({"decay": "cosine", "decay_end": 0.2}, {0: 1.0, 100: 0.6, 200: 0.2}),
        ({"decay": "warmup_stable_decay", "decay_fraction": 0.25}, {0: 1.0, 150: 1.0, 175: 0.5, 200: 0.0}),
        ({"decay": "cosine_restarts", "decay_cycles": 2}, {0: 1.0, 50: 0.5, 100: 1.0, 150: 0.5, 200: 0.0}),
        ({"decay": "inverse_sqrt", "warmup_steps": 50}, {50: 1.0, 200: 0.5}),
        ({"decay": "cosine", "decay_from": 100}, {0: 1.0, 50: 0.5, 100: 1.0, 150: 0.5, 200: 0.0}),
    ],
)
def test_schedules_at_their_landmarks(changes: dict[str, Any], expected: dict[int, float]) -> None:
    rate = learning_rate(_settings(learning_rate=1.0, **changes), STEPS)
    for step, value in expected.items():
        assert float(rate(step)) == pytest.approx(value, abs=1e-6), step


@pytest.mark.parametrize("decay", ["polynomial", "warmup_stable_decay", "cosine_restarts", "inverse_sqrt", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_shortest_trainings_have_a_rate(decay: str, steps: int) -> None:
    settings = _settings(learning_rate=1.0, decay=decay, warmup_steps=3)
    rates = [float(learning_rate(settings, steps)(step)) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates), rates


def test_an_extended_training_begins_anew_and_does_not_jump() -> None:
    settings = _settings(learning_rate=1.0, decay="cosine", warmup_steps=10, decay_from=100)
    rate, before = (
        learning_rate(settings, 200),
        learning_rate(_settings(learning_rate=1.0, decay="cosine", warmup_steps=10), 100),
    )
    for step in range(100):
        assert float(rate(step)) == pytest.approx(float(before(step)), abs=1e-6)
    assert float(rate(99)) < 0.01
    assert float(rate(100)) == pytest.approx(0.1)
    assert max(abs(float(rate(step + 1)) - float(rate(step))) for step in range(199)) < 0.11


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({"train__steps": 12}, True),
        ({"train__steps": 12, "optimizer__decay_from": 6}, False),
        ({"train__steps": 6}, False),
    ],
)
def test_a_resumed_training_says_what_its_new_end_makes_of_the_rate(
    changes: dict[str, Any], warned: bool, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    base = tmp_path_factory.getbasetemp()
    reopened(run_config(data_path(base), **changes), epath.Path(trained_workdir(base)))
    said = "the learning rate was 0 at step 6 of 6, and is 0.00057 at step 6 of 12; with optimizer.decay_from=6 it"
    assert (said in caplog.text) == warned
    assert warned or "learning rate" not in caplog.text
