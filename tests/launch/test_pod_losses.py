"""The real trainer in several processes, of which one is killed: nothing saved is lost, and the run resumes."""

import functools
import os
import random
import re
import shlex
import signal
import sys
from pathlib import Path

import pytest

from tests.launch.fake_bucket import BUCKET, bucket
from tests.launch.fake_cloud import Cloud
from tests.launch.pod import (
    SAVED_EVERY,
    STEPS,
    Moment,
    Pod,
    assert_kills_lose_nothing,
    assert_same,
    at_step,
    committed,
    last_step,
    pod_of,
    resumed_at,
    said,
    saving,
    started,
    steps_of,
)
from tests.several import HEARTBEAT_SECONDS, WITHOUT_TORCH, free_port


@pytest.fixture(scope="module")
def pod(tmp_path_factory: pytest.TempPathFactory) -> Pod:
    return pod_of(tmp_path_factory)


def random_moments(draw: random.Random) -> list[Moment]:
    """Ten: two after the start, two while it compiles, three after steps, and each save."""
    moments = [Moment(draw.randrange(2), started, draw.uniform(0, 8)) for _ in range(2)]
    # What the run compiles first is in no cache yet.
    moments += [Moment(draw.randrange(2), said("sha256"), draw.uniform(0, 15)) for _ in range(2)]
    steps = [(step, at_step(step)) for step in draw.sample(range(1, STEPS - 2), 3)]
    saves = [(step, saving(step)) for step in range(SAVED_EVERY, STEPS, SAVED_EVERY)]
    in_order = sorted(steps + saves, key=lambda pair: pair[0])
    return moments + [Moment(draw.randrange(2), after, draw.uniform(0, 0.2)) for _, after in in_order]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kills_at_ten_random_moments_lose_nothing(pod: Pod, tmp_path: Path) -> None:
    moments = random_moments(random.Random(int(os.environ.get("OFFSETJAX_TEST_SEED", "0"))))
    # With what the work directory itself keeps of what was compiled.
    assert_kills_lose_nothing(moments, pod, tmp_path / "run", JAX_COMPILATION_CACHE_DIR="")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_that_lies_with_its_data_on_a_bucket_goes_on_after_a_kill(pod: Pod, tmp_path: Path) -> None:
    straight = pod.straight()
    with bucket() as store:
        for file in (file for file in pod.data.rglob("*") if file.is_file()):
            store.put(f"data/{file.relative_to(pod.data).as_posix()}", file.read_bytes())
        train = functools.partial(
            pod.train,
            f"gs://{BUCKET}/run",
            2,
            f"--config.data.path=gs://{BUCKET}/data",
            output=tmp_path / "output",
            **store.environment,
        )
        with train() as processes:
            processes.wait_for(lambda: last_step(processes) >= 2 * SAVED_EVERY + 1)
            processes.send(signal.SIGKILL, 1)
            assert processes.wait(HEARTBEAT_SECONDS + 20)[1] == 137, processes.text()
        with train() as processes:
            assert processes.wait(600) == [0, 0], processes.text()
            assert resumed_at(processes) >= SAVED_EVERY
        for name in store.below("run/"):
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(store.objects[name])
    assert committed(tmp_path / "run") == list(range(SAVED_EVERY, STEPS + 1, SAVED_EVERY))
    assert_same(tmp_path / "run", straight)


# What a machine of the fake cloud runs in the place of launch/local.sh: the real trainer, one process of four.
WORKER = """
  export JAX_PROCESS_ID=${{MACHINE##*/}} JAX_NUM_PROCESSES=4 JAX_COORDINATOR_ADDRESS=localhost:{port} {variables}
  exec {python} -m tests.launch.pod_main "${{@/#--workdir=gs:\\/\\//--workdir=$FAKE_CLOUD/gs/}}"
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_supervised_run_of_four_workers_survives_the_loss_of_one(pod: Pod, tmp_path: Path) -> None:
    straight = pod.straight(4)
    cloud, workdir = Cloud(tmp_path / "cloud"), tmp_path / "cloud" / "gs" / "bucket" / "run"
    cloud.plan["workers"] = 4
    variables = {**pod.environment, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", **WITHOUT_TORCH}
    variables["OFFSETJAX_HEARTBEAT_SECONDS"] = str(HEARTBEAT_SECONDS)
    words = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    worker = WORKER.strip().format(port=free_port(), variables=words, python=sys.executable)
    local_sh = cloud.checkout / "launch" / "local.sh"
    local_sh.write_text(local_sh.read_text().replace('exec "$FAKE_CLOUD/machine_bin/offsetjax" "$@"', worker))
    cloud.git("commit", "-qam", "the real trainer")
    try:
        training = ("--", f"--config={pod.config}", "--workdir=gs://bucket/run")
        supervising = cloud.start("supervise", *training, OFFSETJAX_GRACE_SECONDS="600")
        cloud.wait_for(lambda: max(steps_of(workdir), default=0) >= 6, 600)
        (pid,) = cloud.root.glob("machines/my-tpu/2/offsetjax/runs/*/pid")
        os.kill(int(pid.read_text()), signal.SIGKILL)
        _, said = supervising.communicate(timeout=900)
        assert supervising.returncode == 0, said
    finally:
        cloud.close()
    assert re.search(r"the training ended with exit status .*137.*; trying again", said), said
    assert (len(cloud.calls("create")), cloud.calls("delete")) == (1, [])  # the slice was whole
    assert_same(workdir, straight)
