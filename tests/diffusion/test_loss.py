"""Losses against their formulas, computed by other means."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from offsetjax.diffusion.loss import kl_to_standard_normal, mean_squared_error, min_snr_weight
from offsetjax.diffusion.variance_preserving import variance_preserving


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [0.0, 1.0, 5.0])
def test_min_snr_weights_are_those_of_the_paper(prediction_type: str, gamma: float) -> None:
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = np.cumprod(1 - betas)
    ratio = kept / (1 - kept)
    divisor = ratio if prediction_type == "epsilon" else ratio + 1
    expected = np.minimum(ratio, gamma) / divisor if gamma else np.ones(1000)
    schedule = variance_preserving(1000, 0.00085, 0.012, prediction_type)
    weights = [float(min_snr_weight(schedule, jnp.int32(t), gamma)) for t in range(0, 1000, 37)]
    np.testing.assert_allclose(weights, expected[::37], rtol=3e-5)


def test_an_error_of_v_or_of_epsilon_weighs_the_same_once_it_is_one_of_x0() -> None:
    """`w · |Δ|²` is `min(SNR, γ) · |Δx0|²` in either parameterisation: what the weighting is made for."""
    for timestep in (3, 300, 900):
        kept = float(variance_preserving(1000, 0.00085, 0.012, "epsilon").alphas_cumprod[timestep])
        error_of_x0 = {"epsilon": (1 - kept) / kept, "v_prediction": 1 - kept}  # of a unit error of the prediction
        weighted = {
            kind: float(min_snr_weight(variance_preserving(1000, 0.00085, 0.012, kind), jnp.int32(timestep), 5.0))
            / error_of_x0[kind]
            for kind in error_of_x0
        }
        assert weighted["epsilon"] == pytest.approx(weighted["v_prediction"], rel=1e-4)


def test_the_kl_divergence_is_that_of_torch_distributions() -> None:
    generator = np.random.default_rng(0)
    mean, log_variance = (generator.standard_normal((4, 5, 6)).astype(np.float32) for _ in range(2))
    normal = torch.distributions.Normal
    posterior = normal(torch.from_numpy(mean), torch.exp(0.5 * torch.from_numpy(log_variance)))
    expected = torch.distributions.kl_divergence(posterior, normal(0.0, 1.0)).mean()
    assert float(kl_to_standard_normal(jnp.asarray(mean), jnp.asarray(log_variance))) == pytest.approx(
        float(expected), rel=1e-6
    )


def test_the_squared_error_of_bfloat16_is_taken_in_float32() -> None:
    prediction, wanted = jnp.full((4, 64, 64), 3.0, jnp.bfloat16), jnp.zeros((4, 64, 64))
    assert mean_squared_error(prediction, wanted).dtype == jnp.float32
    assert float(mean_squared_error(prediction, wanted)) == 9.0
