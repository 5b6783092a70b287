"""What a step costs under one process beside another: operations and bytes, counted in programs not compiled."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from offsetjax.models.pipeline import build
from offsetjax.models.task import task_of
from offsetjax.models.weights import abstract_params, abstract_trained, new_tokenizers
from offsetjax.training.objective import add_position
from tests.tiny import tiny_config


def _costs(config: ConfigDict) -> dict[str, float]:
    """Of the loss and its gradient, from cached latents."""
    pipeline, count = build(config, new_tokenizers(config.model, ("a square",))), 8
    frozen = {part: abstract_params(pipeline.parts[part]) for part in pipeline.family.encoders}
    batch = {
        "moments": jax.ShapeDtypeStruct((count, 2, 4, 8, 8), jnp.float16),
        "input_ids": {"text_encoder": jax.ShapeDtypeStruct((count, 8), jnp.int32)},
        "time_ids": jax.ShapeDtypeStruct((count, 6), jnp.float32),
    }
    objective = task_of(config).objective(pipeline, config)

    def loss(params: Any, frozen: Any, batch: Any) -> jax.Array:
        return objective(params, frozen, add_position(batch, count), jnp.int32(1)).mean()

    lowered = jax.jit(jax.value_and_grad(loss)).lower(abstract_trained(pipeline, config.lora), frozen, batch)
    return dict(lowered.cost_analysis())


@pytest.fixture(scope="module")
def present() -> dict[str, float]:
    return _costs(tiny_config(data__cached_latents=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"timesteps__density": "logit_normal"},
        {"schedule__conversion": "mapped"},
        {"noise__anneal": 0.5},
    ],
)
def test_a_flows_step_costs_what_the_present_one_does(present: dict[str, float], changes: dict[str, Any]) -> None:
    found = _costs(tiny_config(data__cached_latents=True, schedule__process="flow", **changes))
    assert present["flops"] > 1e7
    for measure in ("flops", "bytes accessed"):
        assert found[measure] == pytest.approx(present[measure], rel=0.02), measure
