"""A hundred SIGKILLs, in chains of ten, of a training of two processes: each chain ends as the undisturbed training."""

import random
from pathlib import Path

import pytest

from tests.launch.pod import Pod, assert_kills_lose_nothing, pod_of
from tests.launch.test_pod_losses import random_moments

CHAINS = 10


@pytest.fixture(scope="module")
def pod(tmp_path_factory: pytest.TempPathFactory) -> Pod:
    return pod_of(tmp_path_factory)


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("chain", range(CHAINS))
def test_ten_kills_lose_nothing(chain: int, pod: Pod, tmp_path: Path) -> None:
    moments = random_moments(random.Random(1000 + chain))
    assert_kills_lose_nothing(moments, pod, tmp_path / "run", JAX_COMPILATION_CACHE_DIR="")
    print(f"\nchain {chain}: {len(moments)} kills")
