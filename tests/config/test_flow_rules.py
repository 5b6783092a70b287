"""What a flow does not read is refused, in a line that says why."""

from typing import Any

import pytest

from offsetjax.config import default_config, validate
from offsetjax.errors import UserError


def _config(**changes: Any) -> Any:
    config = default_config()
    config.schedule.process = "flow"
    config.update_from_flattened_dict({path.replace("__", "."): value for path, value in changes.items()})
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule__prediction_type": "v_prediction"}, r"schedule\.prediction_type cannot apply to .*'flow'"),
        ({"schedule__beta_start": 0.1}, r"schedule\.beta_start cannot apply"),
        ({"schedule__beta_end": 0.0001}, r"schedule\.beta_end cannot apply"),
        ({"schedule__num_train_timesteps": 10}, r"num_train_timesteps cannot apply .* told 1000 t"),
    ],
)
def test_what_a_flow_does_not_read_is_refused(changes: dict[str, Any], message: str) -> None:
    validate(_config())
    with pytest.raises(UserError, match=message):
        validate(_config(**changes))


def test_a_mapped_flow_reads_what_its_network_was_trained_with() -> None:
    mapped = {"schedule__conversion": "mapped", "model__pretrained": "a model", "noise__offset_strength": 0.1}
    validate(_config(**mapped, schedule__prediction_type="v_prediction", schedule__beta_start=0.001))
