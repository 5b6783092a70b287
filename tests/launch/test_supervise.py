"""`launch/tpu_vm.sh supervise` on a fake cloud: what it starts again, and that a run resumes where it was."""

import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.launch.fake_cloud import LAST_STEP, TRAINING, Cloud

OTHER_TRAINING = ("--", "--config=configs/b.py", "--workdir=gs://bucket/run")


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    cloud = Cloud(tmp_path)
    cloud.file("gs/bucket/run").mkdir(parents=True)
    yield cloud
    cloud.close()


def run_file(cloud: Cloud, name: str) -> Path:
    return cloud.file(f"gs/bucket/run/{name}")


def is_watched(cloud: Cloud) -> bool:
    """Whether the workers were asked again after the start."""
    return any(" start " in call[-1] for call in cloud.calls("ssh")[:-1])


def end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def test_a_preempted_slice_is_made_again_and_the_run_goes_on(cloud: Cloud) -> None:
    cloud.plan["workers"] = 2
    process = cloud.start("supervise", *TRAINING)
    cloud.wait_for(lambda: len(cloud.steps("my-tpu.0")) > 6)
    # What changes here meanwhile is not for this run.
    with (cloud.checkout / "launch" / "settings.sh").open("a") as file:
        file.write("# changed\n")
    cloud.preempt()
    status, err = end_of(process)
    assert status == 0, err
    assert "trying again in 30 s (failure 1 of at most 10 in a row)" in err
    assert len(cloud.calls("create")) == 2
    assert len(cloud.calls("delete", "--force")) == 1
    for worker in ("my-tpu.0", "my-tpu.1"):
        steps = cloud.steps(worker)
        assert steps[-1] == LAST_STEP
        assert set(steps) == set(range(1, LAST_STEP + 1))
        assert len(steps) < LAST_STEP + 5
        # It went back, if at all, to a step that was saved, and not to the beginning.
        assert all(after == before + 1 or after % 5 == 1 for before, after in pairwise(steps))
        assert steps.count(1) == 1
    source = cloud.file("machines/my-tpu/0/offsetjax/source/launch/settings.sh")
    assert "# changed" not in source.read_text()


def test_storage_that_needs_a_person_ends_it_on_all_workers(cloud: Cloud) -> None:
    cloud.plan["workers"] = 2
    run_file(cloud, "hold").touch()
    run_file(cloud, "exits.my-tpu.1").write_text("74\n")
    status, err = end_of(cloud.start("supervise", *TRAINING))
    assert (status, "exit status 74: its storage needs a person, see `logs`" in err) == (74, True), err
    assert len(cloud.calls("create")) == 1
    assert "exit status 74: its storage needs a person" in cloud.do("status")


def test_a_mistake_in_the_config_ends_it_on_all_workers(cloud: Cloud) -> None:
    cloud.plan["workers"] = 2
    run_file(cloud, "hold").touch()
    run_file(cloud, "exits.my-tpu.1").write_text("2\n")
    status, err = end_of(cloud.start("supervise", *TRAINING))
    assert (status, "a mistake in the settings, see `logs`" in err) == (2, True)
    assert len(cloud.calls("create")) == 1
    out = cloud.do("status")
    assert "my-tpu/0: run" in out and "exit status 137: killed" in out
    assert "exit status 2: a mistake in the settings" in out


@pytest.mark.parametrize(
    "plan",
    [
        {"refuse_create": "RESOURCE_EXHAUSTED: Quota limit has been exceeded"},
        {"states": [["PROVISIONING", "FAILED||Quota limit has been exceeded"]]},
        {"refuse_describe": "PERMISSION_DENIED: no"},
    ],
)
def test_what_only_the_user_can_mend_is_not_tried_again(cloud: Cloud, plan: dict[str, object]) -> None:
    cloud.plan |= plan
    status, err = end_of(cloud.start("supervise", *TRAINING))
    assert status == 2, err
    assert len(cloud.calls("create")) <= 1


def test_a_run_that_was_saved_or_stalled_is_started_again_after_growing_pauses(cloud: Cloud) -> None:
    run_file(cloud, "exits.my-tpu.0").write_text("143\n75\n")
    status, err = end_of(cloud.start("supervise", *TRAINING))
    assert status == 0, err
    for failure, (code, pause) in enumerate({143: 30, 75: 60}.items(), 1):
        assert f"ended with exit status {code}; trying again in {pause} s (failure {failure} of at most 10" in err
    assert cloud.file("sleeps").read_text() == "30\n60\n"
    assert cloud.steps("my-tpu.0") == list(range(1, LAST_STEP + 1))
    assert len(cloud.calls("create")) == 1


def test_a_worker_that_waits_for_a_lost_peer_is_ended_and_all_start_again(cloud: Cloud) -> None:
    cloud.plan["workers"] = 2
    run_file(cloud, "hold").touch()
    process = cloud.start("supervise", *TRAINING)
    cloud.wait_for(lambda: is_watched(cloud))
    cloud.kill_machines("my-tpu/1")
    cloud.wait_for(lambda: any(cloud.root.glob("machines/my-tpu/0/offsetjax/runs/*/status")))
    run_file(cloud, "hold").unlink()
    status, err = end_of(process)
    assert (status, "ended on some workers only, with exit status lost" in err) == (0, True), err
    for worker in ("my-tpu.0", "my-tpu.1"):
        assert cloud.steps(worker) == list(range(1, LAST_STEP + 1))


def test_failures_in_a_row_are_counted_and_bounded(cloud: Cloud) -> None:
    run_file(cloud, "exits.my-tpu.0").write_text("1\n" * 9)
    status, err = end_of(cloud.start("supervise", "--max_restarts=1", *TRAINING))
    assert (status, "that was failure 2 in a row (--max_restarts=1)" in err) == (1, True), err
    assert len([call for call in cloud.calls("ssh") if " start " in call[-1]]) == 2


def test_a_long_run_starts_the_count_anew(cloud: Cloud) -> None:
    run_file(cloud, "exits.my-tpu.0").write_text("1\n1\n")
    status, err = end_of(cloud.start("supervise", "--max_restarts=1", *TRAINING, OFFSETJAX_STEADY_SECONDS="0"))
    assert (status, err.count("trying again in 30 s (failure 1 of at most 1 in a row)")) == (0, 2), err


def test_what_comes_before_a_run_is_no_part_of_it(cloud: Cloud) -> None:
    run_file(cloud, "exits.my-tpu.0").write_text("1\n1\n")
    slow = ("--max_restarts=1", "--prepare=/bin/sleep 4")
    status, err = end_of(cloud.start("supervise", *slow, *TRAINING, OFFSETJAX_STEADY_SECONDS="4"))
    assert (status, "that was failure 2 in a row" in err) == (1, True), err


def test_a_run_that_the_user_stops_is_not_started_again(cloud: Cloud) -> None:
    run_file(cloud, "hold").touch()
    process = cloud.start("supervise", *TRAINING)
    cloud.wait_for(lambda: is_watched(cloud))
    cloud.do("stop")
    status, err = end_of(process)
    assert (status, "was stopped; the same command resumes it" in err) == (143, True), err
    run_file(cloud, "hold").unlink()
    assert end_of(cloud.start("supervise", *TRAINING))[0] == 0
    assert len(cloud.calls("create")) == 1


def test_a_run_that_goes_on_already_is_watched(cloud: Cloud) -> None:
    cloud.be_ready()
    run_file(cloud, "hold").touch()
    run = cloud.do("train", *TRAINING).strip()
    status, err = end_of(cloud.start("supervise", *OTHER_TRAINING))
    assert (status, f"busy with another run, {run}" in err, err.count("\n")) == (2, True, 1)
    before = len(cloud.calls("ssh"))
    process = cloud.start("supervise", *TRAINING)
    cloud.wait_for(lambda: len(cloud.calls("ssh")) >= before + 2)
    run_file(cloud, "hold").unlink()
    status, err = end_of(process)
    assert (status, f"following run {run}" in err, f"run {run} is done" in err) == (0, True, True), err
    assert cloud.steps("my-tpu.0") == list(range(1, LAST_STEP + 1))


def test_silence_of_an_active_slice_is_no_reason_to_delete_it(cloud: Cloud) -> None:
    run_file(cloud, "hold").touch()
    process = cloud.start("supervise", *TRAINING)
    cloud.wait_for(lambda: is_watched(cloud))
    cloud.plan["drop"] = {"word": "status", "worker": "my-tpu/0", "when": "before"}
    cloud.write_plan()
    status, err = end_of(process)
    assert (status, "do not answer, but my-tpu is ACTIVE; the training may still run" in err) == (1, True), err
    assert cloud.calls("delete") == []


def test_a_dead_slice_of_an_active_resource_is_made_again(cloud: Cloud) -> None:
    run_file(cloud, "hold").touch()
    process = cloud.start("supervise", *TRAINING)
    cloud.wait_for(lambda: is_watched(cloud))
    cloud.plan["node_states"] = {"my-tpu": "PREEMPTED"}
    cloud.write_plan()
    cloud.wait_for(lambda: cloud.calls("delete"))
    cloud.plan["node_states"] = {}
    cloud.write_plan()
    run_file(cloud, "hold").unlink()
    status, err = end_of(process)
    assert (status, len(cloud.calls("create"))) == (0, 2), err


def test_a_config_that_is_not_there_is_found_before_a_slice_is_made(cloud: Cloud) -> None:
    (cloud.checkout / "offsetjax").mkdir()
    status, err = end_of(cloud.start("supervise", *TRAINING))
    assert status == 2 and "--config=configs/a.py: there is no such file in " in err and not cloud.calls("create")


def test_a_config_that_is_refused_is_found_before_a_slice_is_made(cloud: Cloud) -> None:
    (cloud.checkout / "offsetjax").mkdir()
    (cloud.checkout / "configs").mkdir()
    (cloud.checkout / "configs" / "a.py").write_text("")
    python = cloud.checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/sh\necho "$@" >&2\necho "offsetjax: error: config: no function get_config()" >&2\nexit 2\n'
    )
    python.chmod(0o755)
    status, err = end_of(cloud.start("supervise", *TRAINING, "--config.train.steps=1"))
    assert status == 2 and "config: no function get_config()" in err and not cloud.calls("create")
