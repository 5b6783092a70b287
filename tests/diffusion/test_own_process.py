"""A process that others bring: trained with, and sampled from, without a line changed in the package."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from offsetjax.config import validate
from offsetjax.diffusion.flow import Flow
from offsetjax.diffusion.process import PROCESSES, make_process
from offsetjax.diffusion.sampler import coefficients, solve
from offsetjax.errors import UserError
from tests.training.test_objective import _config, _look


@dataclass(frozen=True)
class PredictsLatents:
    """The path of a flow, on which the network predicts x0; told t."""

    flow: Flow

    @classmethod
    def make(cls, schedule: Mapping[str, Any], downscale: int) -> "PredictsLatents":
        return cls(Flow(shift=schedule["shift"]))

    @staticmethod
    def rules(values: Mapping[str, Any]) -> Iterator[tuple[object, str]]:
        yield values["loss.min_snr_gamma"], "loss.min_snr_gamma cannot apply to a toy"

    @staticmethod
    def recognise(scheduler: Mapping[str, Any]) -> dict[str, Any] | None:
        return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.flow, name)

    def network_timestep(self, timestep: Any) -> Any:
        return timestep

    def target(self, latent: Any, noise: Any, rate: Any, timestep: Any) -> Any:
        return latent

    def to_latent_and_noise(self, noisy: Any, prediction: Any, timestep: Any) -> tuple[Any, Any]:
        return prediction, (noisy - (1.0 - timestep) * prediction) / timestep


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PROCESSES, "_registered", {})
    PROCESSES.register("toy", PredictsLatents)


def test_a_registered_process_trains_and_samples() -> None:
    config = _config(schedule__process="toy", noise__offset_strength=0.2)
    validate(config)
    seen = _look(config, log_variance=0.0)
    told = np.asarray(seen.timesteps)
    assert told.min() >= 0 and 0.9 < told.max() <= 1
    assert np.asarray(seen.target).std() < np.asarray(_look(_config(schedule__process="flow")).target).std()
    process = make_process(config.schedule)
    table = coefficients("euler", process.grid("euler", 5, "trailing", 1.0))
    start = jnp.ones((1, 4, 2, 2))
    end = solve(lambda noisy, told: jnp.full_like(noisy, 0.3), process, table, start)
    np.testing.assert_allclose(end, 0.3, atol=1e-6)


def test_its_rules_hold() -> None:
    with pytest.raises(Exception, match=r"min_snr_gamma cannot apply to a toy"):
        validate(_config(schedule__process="toy", loss__min_snr_gamma=5.0))


@pytest.mark.parametrize(
    ("field", "value"),
    [("conversion", "mapped"), ("shift_rule", "tokens"), ("zero_terminal_snr", True), ("num_train_timesteps", 50)],
)
def test_what_it_does_not_read_cannot_be_set(field: str, value: Any) -> None:
    validate(_config(schedule__process="toy", schedule__shift=2.0))
    expected = rf"schedule\.{field} = {value!r} cannot apply to schedule\.process = 'toy', which does not read it"
    with pytest.raises(UserError, match=expected):
        validate(_config(schedule__process="toy", **{f"schedule__{field}": value}))
