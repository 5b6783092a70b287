"""A bucket that fails one call in twenty with 503: what is written and read is as if it had not."""

import functools
from pathlib import Path

import pytest

from tests.launch.fake_bucket import BUCKET, bucket, run_on
from tests.launch.pod import SAVED_EVERY, STEPS, Pod, assert_same, committed, pod_of

FAULTS = 0.05


@pytest.fixture(scope="module")
def pod(tmp_path_factory: pytest.TempPathFactory) -> Pod:
    return pod_of(tmp_path_factory)


# What a run does with its work directory, without a model: a lock, a record, checkpoints, and again after a restart.
WORK = """
import logging, sys
import jax, numpy as np
from etils import epath
from offsetjax.storage import arrays as step_arrays
from offsetjax.storage import checkpoint, retry
from offsetjax.storage.lock import WorkdirLock
from offsetjax.training.jsonl import JsonLines, read_log

retry.WAITS = (0.01,) * 8
place = sys.argv[1]
state = lambda step: {"params": {"kernel": jax.numpy.arange(6.0) * step}, "step": jax.numpy.int32(step)}
like = checkpoint.abstract(state(0), jax.tree.map(lambda array: array.sharding, state(0)))
for start in (0, 4):
    with WorkdirLock(place, lost=lambda why: None) as lock:
        lock.acquire()
        record = JsonLines(epath.Path(place), start, 8)
        with checkpoint.open_checkpoints(place, 2) as manager:
            if start:
                restored, data = checkpoint.restore_newest(manager, like, lambda step, data: None)
                assert (int(restored["step"]), data["next_batch"]) == (4, 4)
                np.testing.assert_array_equal(restored["params"]["kernel"], np.arange(6.0) * 4)
            for step in range(start + 1, start + 5):
                record.scalars(step, {"loss": 1.0 / step})
                if step % 2 == 0:
                    lock.check()
                    checkpoint.save(manager, step, state(step), {"next_batch": step})
            checkpoint.wait(manager, 100)
            assert step_arrays.verify(manager, start + 4) == 2
log = read_log(place)
assert [line.step for line in log.lines] == list(range(1, 9)) and not log.unreadable and not log.torn
assert [line.values["loss"] for line in log.lines] == [1.0 / step for step in range(1, 9)]
"""


def test_a_bucket_that_fails_one_call_in_twenty_changes_nothing(tmp_path: Path) -> None:
    with bucket() as store:
        store.fault_fraction = FAULTS
        run_on(store, WORK, f"gs://{BUCKET}/run", cwd=tmp_path)
        assert store.faults >= 3
        print(f"\n{store.faults} of {store.calls} calls failed")


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_a_training_on_a_bucket_that_fails_one_call_in_twenty_is_the_undisturbed_one(pod: Pod, tmp_path: Path) -> None:
    straight = pod.straight()
    with bucket() as store:
        for file in (file for file in pod.data.rglob("*") if file.is_file()):
            store.put(f"data/{file.relative_to(pod.data).as_posix()}", file.read_bytes())
        store.fault_fraction = FAULTS
        train = functools.partial(pod.train, f"gs://{BUCKET}/run", 2, f"--config.data.path=gs://{BUCKET}/data")
        with train(output=tmp_path / "output", **store.environment) as processes:
            assert processes.wait(1200) == [0, 0], processes.text()
        store.fault_fraction = 0.0
        for name in store.below("run/"):
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(store.objects[name])
        print(f"\n{store.faults} of {store.calls} calls failed")
    assert committed(tmp_path / "run") == list(range(SAVED_EVERY, STEPS + 1, SAVED_EVERY))
    assert_same(tmp_path / "run", straight)
