"""Facts that hold of any input: few drawn ones in the quick tests, always the same; a thousand behind the marker."""

import pytest
from hypothesis import HealthCheck, settings

COUNTS = [25, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
each_count = pytest.mark.parametrize("count", COUNTS)


def checked(count: int) -> settings:
    """How a fact is checked on so many inputs."""
    return settings(
        max_examples=count,
        deadline=None,  # a machine may be busy
        derandomize=count <= 25,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
