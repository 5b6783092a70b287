"""launch/tpu_vm.sh on a fake cloud: what it asks of gcloud, what it makes of the answers, what reaches the workers."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.fake_cloud import LAST_STEP, NAME, TRAINING, Cloud

COMMANDS = ("create", "setup", "train", "status", "logs", "stop", "delete", "supervise")
DESCRIBE = (
    "gcloud compute tpus queued-resources describe my-tpu --zone=us-west4-a"
    """ '--format=value[separator="|"](state.state,state.stateInitiator,state.failedData.error.message)'"""
)
LIST = (
    "gcloud compute tpus tpu-vm list --zone=us-west4-a '--filter=queuedResource~\"/queuedResources/my-tpu$\"'"
    " '--format=csv[no-heading](name.basename(),state,networkEndpoints.len())'"
)
SSH = "--zone=us-west4-a --worker=all '--ssh-flag=-oConnectTimeout=20 -oServerAliveInterval=15'"
WORKER_SH = "offsetjax/source/launch/tpu_worker.sh"
ASK = f"""'--command=[ ! -x {WORKER_SH} ] && echo "offsetjax ${{HOSTNAME##*-w-}} absent" || {WORKER_SH} status'"""


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    cloud = Cloud(tmp_path)
    yield cloud
    cloud.close()


def dry_run(cloud: Cloud, command: str, *flags: str) -> list[str]:
    """The lines, with the run's id and the checkout's place replaced."""
    more = TRAINING if command in ("train", "supervise") and "--" not in flags else ()
    out = cloud.do(command, "--dry_run", "--yes", *flags, *more)
    return re.sub(r"\d{8}-\d{6}-\d+-\d+", "RUN", out.replace(str(cloud.checkout), "CHECKOUT")).splitlines()


def test_a_dry_run_prints_what_would_be_run(cloud: Cloud) -> None:
    assert dry_run(cloud, "create") == [
        DESCRIBE,
        "gcloud compute tpus queued-resources create my-tpu --zone=us-west4-a --node-id=my-tpu"
        " --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot",
        DESCRIBE,
    ]
    assert dry_run(cloud, "setup") == [
        DESCRIBE,
        LIST,
        f"gcloud compute tpus tpu-vm ssh my-tpu {SSH} {ASK}",
        "git -C 'CHECKOUT' archive --format=tar.gz --output=offsetjax.tar.gz HEAD",
        "gcloud compute tpus tpu-vm scp offsetjax.tar.gz my-tpu:offsetjax.tar.gz --zone=us-west4-a --worker=all"
        " --scp-flag=-oConnectTimeout=20",
        f"gcloud compute tpus tpu-vm ssh my-tpu {SSH} '--command=rm -rf offsetjax/source && mkdir -p offsetjax/source"
        f" && tar -xzf offsetjax.tar.gz -C offsetjax/source && {WORKER_SH} setup'",
    ]
    assert dry_run(cloud, "train") == [
        DESCRIBE,
        LIST,
        f"gcloud compute tpus tpu-vm ssh my-tpu {SSH} {ASK}",
        f"gcloud compute tpus tpu-vm ssh my-tpu {SSH} '--command={WORKER_SH} start RUN --config=configs/a.py"
        " --workdir=gs://bucket/run'",
    ]
    assert dry_run(cloud, "delete") == [
        DESCRIBE,
        "gcloud compute tpus queued-resources delete my-tpu --zone=us-west4-a --force --quiet",
    ]
    assert cloud.calls() == []


def test_several_slices_reserved_through_iap(cloud: Cloud) -> None:
    flags = ("--node_count=2", "--project=p", "--tier=reserved", "--accelerator_type=v5p-32", "--ssh=iap")
    create = dry_run(cloud, "create", *flags, "--create_flags=--internal-ips --labels=a=b")[1]
    assert create == (
        "gcloud compute tpus queued-resources create my-tpu --zone=us-west4-a --project=p --node-count=2"
        " --node-prefix=my-tpu --accelerator-type=v5p-32 --runtime-version=v2-alpha-tpuv5 --reserved --internal-ips"
        " --labels=a=b"
    )
    ssh = dry_run(cloud, "stop", *flags)[-2:]
    for i in range(2):
        assert ssh[i].startswith(f"gcloud alpha compute tpus tpu-vm ssh my-tpu-{i} --zone=us-west4-a --project=p ")
        assert " --tunnel-through-iap " in ssh[i]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_dry_run_can_be_pasted(cloud: Cloud, command: str) -> None:
    odd = ("--", "--config=a 'b' \"c\" $(touch pasted) `touch pasted`; touch pasted #.py", "--workdir=gs://bucket/run")
    out = cloud.do(command, "--dry_run", "--yes", *(odd if command in ("train", "supervise") else ()))
    assert out.count("gcloud ") >= 2
    # Run by a shell whose gcloud and git do nothing: nothing else is run, whatever the arguments.
    quiet = f"gcloud() {{ :; }}; git() {{ :; }}\n{out}"
    for shell in ("bash", "sh"):
        done = subprocess.run([shell, "-euc", quiet], cwd=cloud.root, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(cloud.root.rglob("pasted"))


def test_gcloud_knows_all_the_flags(cloud: Cloud) -> None:
    gcloud = shutil.which("gcloud")
    if gcloud is None:
        pytest.skip("no gcloud on this machine")
    flags = ("--node_count=2", "--project=p")
    lines = [line for command in COMMANDS for line in cloud.do(
        command, *flags, "--dry_run", "--yes", *(TRAINING if command in ("train", "supervise") else ())
    ).splitlines()]  # fmt: skip
    lines += cloud.do("stop", "--ssh=iap", "--dry_run").splitlines()
    lines += cloud.do("stop", "--ssh=internal", "--dry_run").splitlines()
    commands = [
        {"command_string": line} for line in dict.fromkeys(lines) if line.startswith("gcloud ") and "#" not in line
    ]
    assert len(commands) > 8
    (cloud.root / "commands.json").write_text(json.dumps(commands))
    lint = subprocess.run(
        [gcloud, "meta", "lint-gcloud-commands", f"--commands-file={cloud.root / 'commands.json'}"],
        env=os.environ | {"CLOUDSDK_CONFIG": str(cloud.root / "gcloud"), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if lint.returncode:
        pytest.skip(f"this gcloud cannot check commands: {lint.stderr[-200:]}")
    results = json.loads(lint.stdout)
    assert len(results) == len(commands)
    assert [result["error_message"] for result in results if not result["success"]] == []


def test_from_nothing_to_a_saved_run_on_two_slices(cloud: Cloud) -> None:
    cloud.plan["workers"] = 2
    two = "--node_count=2"
    _, _, err = cloud.run("create", two)
    assert [line.split()[3] for line in err.splitlines()] == ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    assert len(cloud.calls("create")) == 1
    cloud.do("create", two)  # there already: nothing is asked for twice
    assert len(cloud.calls("create")) == 1

    status, _, err = cloud.run("train", two, *TRAINING)
    assert (status, err.count("absent"), "`setup`" in err) == (2, 4, True)
    (cloud.checkout / "untracked.txt").touch()
    with (cloud.checkout / "launch" / "settings.sh").open("a") as file:
        file.write("# changed\n")
    _, _, err = cloud.run("setup", two, "--prepare=echo hello >prepared; pwd >>prepared")
    assert "4 workers are ready python 3.12.3 jax 0.10.2 source " in err
    assert "not copied, because git does not track it: untracked.txt" in err
    for home in (cloud.file(f"machines/my-tpu-{i}/{j}") for i in range(2) for j in range(2)):
        assert (home / "offsetjax/prepared").read_text() == f"hello\n{home}/offsetjax\n"
        assert (home / "offsetjax/source/launch/settings.sh").read_text().endswith("# changed\n")

    cloud.file("gs/bucket/run").mkdir(parents=True)
    cloud.file("gs/bucket/run/hold").touch()
    run = cloud.do("train", two, *TRAINING).strip()
    assert re.fullmatch(r"\d{8}-\d{6}-\d+-\d+", run)
    out = cloud.do("status", two)
    assert out.startswith("my-tpu: ACTIVE\nmy-tpu-0: READY, 2 workers\n")
    assert out.count(f": run {run} is running\n") == 4
    assert cloud.do("logs", two, "--slice=1", "--worker=1") == "training from step 0\n"
    assert cloud.calls("logs", "ssh") == []
    assert cloud.calls("ssh", "my-tpu-1", "--worker=1")

    for arguments in (("train", two, *TRAINING), ("setup", two)):
        status, _, err = cloud.run(*arguments)
        assert (status, f"my-tpu is busy: my-tpu-0/0 running {run}" in err, err.count("\n")) == (2, True, 1)

    cloud.do("stop", two)
    assert len(list(cloud.file("gs/bucket/run").glob("saved.*"))) == 4
    assert cloud.do("status", two).count("ended with exit status 143: saved after a signal") == 4
    assert "nothing is training" in cloud.run("stop", two)[2]

    status, _, err = cloud.run("delete", two)
    assert (status, "--yes" in err, err.count("\n")) == (2, True, 1)
    cloud.do("delete", two, "--yes")
    assert not list(cloud.file("machines").iterdir())
    assert cloud.do("status", two) == "my-tpu: ABSENT\n"
    assert "there is no my-tpu" in cloud.run("delete", two, "--yes")[2]


QUOTA = "RESOURCE_EXHAUSTED: Quota limit 'TPUV5sLitepodPerProjectPerZone' has been exceeded."


@pytest.mark.parametrize(
    ("plan", "flags", "status", "says"),
    [
        ({"refuse_create": QUOTA}, (), 2, ["TPUV5sLitepodPerProjectPerZone", "ask for quota"]),
        ({"refuse_create": "PERMISSION_DENIED: caller lacks tpu.nodes.create"}, (), 2, ["TPU Admin"]),
        ({"refuse_create": "UNAVAILABLE: try again later"}, (), 1, ["UNAVAILABLE"]),
        ({"refuse_describe": "PERMISSION_DENIED: on 'locations/x'"}, (), 2, ["TPU Admin"]),
        ({"states": [["FAILED||no capacity before the deadline"]]}, (), 1, ["no capacity", "`delete --yes`"]),
        ({"states": [["PROVISIONING", f"FAILED||{QUOTA}"]]}, (), 2, ["TPUV5sLitepodPerProjectPerZone"]),
        ({"states": [["SUSPENDING|SERVICE|"]]}, (), 1, ["SUSPENDING (preempted)", "cannot be restarted"]),
        ({"states": [["WAITING_FOR_RESOURCES"]]}, ("--wait_minutes=0",), 1, ["after 0 min: it stays queued"]),
    ],
)  # fmt: skip
def test_says_why_there_are_no_slices(
    cloud: Cloud, plan: dict[str, object], flags: tuple[str, ...], status: int, says: list[str]
) -> None:
    cloud.plan |= plan
    got, out, err = cloud.run("create", *flags)
    assert (got, out) == (status, "")
    error = [line for line in err.splitlines() if "error:" in line]
    assert len(error) == 1
    for text in says:
        assert text in error[0]


def test_suspended_slices_are_deleted_by_force(cloud: Cloud) -> None:
    cloud.plan["states"] = [["SUSPENDED|SERVICE|"], ["ACTIVE"]]
    assert cloud.run("create")[0] == 1
    status, _, err = cloud.run("setup")
    assert (status, "SUSPENDED (preempted), not ACTIVE" in err) == (1, True)
    cloud.do("delete", "--yes")
    assert len(cloud.calls("delete", "--force", "--quiet")) == 1
    cloud.do("create")


def test_one_of_four_workers_fails_at_set_up(cloud: Cloud) -> None:
    cloud.plan["workers"] = 4
    cloud.file("broken.my-tpu.2").touch()
    cloud.do("create")
    status, _, err = cloud.run("setup")
    assert status == 1
    assert "my-tpu/2 failed local.sh: no space left on device (the whole log is " in err
    assert "my-tpu/1" not in err
    cloud.file("broken.my-tpu.2").unlink()
    cloud.do("setup")


def test_workers_whose_versions_differ_do_not_train(cloud: Cloud) -> None:
    cloud.plan["workers"] = 4
    cloud.file("version.my-tpu.3").write_text("0.10.1")
    cloud.do("create")
    status, _, err = cloud.run("setup")
    assert (status, "the workers differ" in err) == (1, True)
    assert err.count("jax 0.10.2") == 3
    assert "my-tpu/3 ready python 3.12.3 jax 0.10.1" in err


def test_a_worker_that_does_not_answer_is_missed_although_gcloud_would_not_say_so(cloud: Cloud) -> None:
    cloud.plan["workers"] = 4
    cloud.be_ready()
    shutil.rmtree(cloud.file("machines/my-tpu/2"))
    for command in ("status", "stop", "train", "setup"):
        status, out, err = cloud.run(command, *(TRAINING if command == "train" else ()))
        assert status == 1
        assert "3 of 4 workers answered: my-tpu/0 my-tpu/1 my-tpu/3" in err
        assert "Connection timed out" in err
    assert out == ""


def test_a_connection_that_breaks_after_the_start_starts_nothing_twice(cloud: Cloud) -> None:
    cloud.plan["workers"] = 2
    cloud.be_ready()
    cloud.plan["drop"] = {"word": " start ", "worker": "my-tpu/1", "when": "after"}
    cloud.do("train", *TRAINING)
    cloud.wait_for(lambda: "status 0: done" in cloud.do("status"))
    assert cloud.steps("my-tpu.1") == list(range(1, LAST_STEP + 1))


def test_a_training_that_starts_on_some_workers_only_is_ended_there(cloud: Cloud) -> None:
    cloud.plan["workers"] = 2
    cloud.be_ready()
    cloud.plan["drop"] = {"word": " start ", "worker": "my-tpu/1", "when": "before"}
    cloud.file("gs/bucket/run").mkdir(parents=True)
    cloud.file("gs/bucket/run/hold").touch()  # it is not done before it is ended
    status, out, err = cloud.run("train", *TRAINING)
    assert (status, out) == (1, "")
    assert "did not start on every worker, and was ended on the others" in err
    out = cloud.do("status")
    assert "my-tpu/0: run " in out and "ended with exit status 137: killed" in out
    assert "my-tpu/1: idle" in out
    cloud.plan["drop"] = None
    cloud.do("train", *TRAINING)


def test_a_stranger_on_the_tpu_is_named_and_what_a_crash_left_is_removed(cloud: Cloud) -> None:
    cloud.be_ready()
    cloud.file("holder").write_text("4711 4711")
    status, _, err = cloud.run("train", *TRAINING)
    assert (status, "the TPU is held by process 4711, which is none of offsetjax's" in err) == (1, True)
    cloud.file("holder").unlink()
    lockfile = cloud.file("machines/my-tpu/0/libtpu_lockfile")
    lockfile.touch()
    cloud.do("train", *TRAINING)
    assert not lockfile.exists()


def test_stop_signals_once_and_waits_until_the_checkpoint_is_saved(cloud: Cloud) -> None:
    cloud.be_ready()
    cloud.file("gs/bucket/run").mkdir(parents=True)
    cloud.file("gs/bucket/run/hold").touch()
    cloud.do("train", *TRAINING)
    cloud.plan["drop"] = {"word": " stop ", "worker": "my-tpu/0", "when": "after"}
    cloud.do("stop")
    cloud.do("stop")
    assert cloud.file("gs/bucket/run/signals.my-tpu.0").read_text() == "1"
    assert cloud.file("gs/bucket/run/saved.my-tpu.0").exists()


def test_a_training_that_does_not_end_is_killed_on_demand_only(cloud: Cloud) -> None:
    cloud.be_ready()
    cloud.file("gs/bucket/run").mkdir(parents=True)
    cloud.file("gs/bucket/run/hold").touch()
    local_sh = cloud.file("machines/my-tpu/0/offsetjax/source/launch/local.sh")
    local_sh.write_text("#!/bin/bash\ntrap '' TERM\nwhile :; do sleep 0.1; done\n")
    cloud.do("train", *TRAINING)
    status, _, err = cloud.run("stop", "--stop_minutes=0")
    assert (status, "still running after 0 min: my-tpu/0 running" in err, "`stop --now`" in err) == (1, True, True)
    assert "is running, and was asked to stop" in cloud.do("status")
    cloud.do("stop", "--now")
    assert "ended with exit status 137: killed" in cloud.do("status")


def test_a_machine_that_went_down_is_seen(cloud: Cloud) -> None:
    cloud.be_ready()
    cloud.do("train", *TRAINING)
    cloud.kill_machines()
    assert "ended without an exit status: the machine went down" in cloud.do("status")
    assert cloud.run("train", *TRAINING)[0] == 0


def test_arguments_reach_the_training_exactly(cloud: Cloud) -> None:
    arguments = [
        "--config=a b.py",
        "--workdir=gs://bucket/run",
        '--config.a=it\'s "$HOME" $(touch x) `touch x`; touch x # é',
    ]
    arguments += ["--config.b=('a  b', 'c')", "--config.c=", "*", "~", "", "\\"]
    cloud.be_ready()
    cloud.do("train", "--", *arguments)
    cloud.wait_for(cloud.file("arguments.my-tpu.0").exists)
    got = cloud.file("arguments.my-tpu.0").read_bytes().decode().split("\0")[:-1]
    assert got == ["train", *arguments]
    assert not list(cloud.root.rglob("x"))


@pytest.mark.parametrize("command", [["data", "encode"], ["calibrate"]])
def test_other_commands_run_on_every_worker(cloud: Cloud, command: list[str]) -> None:
    cloud.plan["workers"] = 2
    arguments = [*command, "--config=configs/a.py", "--out=gs://bucket/out"]
    assert "is done" in cloud.run("supervise", "--", *arguments)[2]
    for worker in range(2):
        assert cloud.file(f"arguments.my-tpu.{worker}").read_bytes().decode().split("\0")[:-1] == arguments


def test_the_env_file_is_read_and_not_run(cloud: Cloud) -> None:
    env = cloud.root / "my env"
    env.write_text(
        "# a comment\r\n\nNODE_COUNT=3\nTIER=reserved\nRUNTIME_VERSION=v2-alpha-tpuv5\n"
        "PREPARE=$(touch x); echo \"hello\" 'you' >&2\n"
    )
    lines = dry_run(cloud, "create", "--tier=on_demand", f"--env={env}", "--node_count=2")
    assert lines[1].endswith(" --node-count=2 --node-prefix=my-tpu --accelerator-type=v5litepod-16"
                             " --runtime-version=v2-alpha-tpuv5")  # fmt: skip
    assert 'echo "hello" \'' in dry_run(cloud, "setup", f"--env={env}")[-1]
    assert not list(cloud.root.rglob("x"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["create", "--name="], "--name is missing"),
        (["create", "--name=my tpu"], "--name='my tpu'"),
        (["create", "--name=a';touch x;'"], "--name="),
        (["create", "--name=$(touch x)"], "--name='$(touch x)'"),
        (["create", "--zone=us-west4-a;touch x"], "--zone="),
        (["create", "--node_count=two"], "--node_count=two"),
        (["create", "--node_count=0"], "--node_count=0"),
        (["create", "--tier=cheap"], "spot"),
        (["create", "--accelerator_type=tpu7x-8"], "v5litepod-8"),
        (["create", "--zoen=a"], "there is no setting zoen; there are: name zone"),
        (["create", "--dryrun"], "unknown flag --dryrun"),
        (["create", "a"], "unknown argument a"),
        (["create", "--name=a\nb"], "control character"),
        (["create", "--", "--config=a"], "create takes nothing after --"),
        (["create", "--env=nowhere"], "no such file: nowhere"),
        (["destroy"], "a command is expected"),
        (["train"], "arguments follow --"),
        (["train", "--", "--config=a"], "--workdir=gs://"),
        (["train", "--", "--config=a", "--workdir=run"], "gs://"),
        (["train", "--", "--config=a\nb", "--workdir=gs://a"], "control character"),
        (["train", "--", "data", "build", "--out=gs://a"], "`train`, `calibrate` and `data encode` alone run on"),
        (["train", "--", "data", "encode", "--config=a"], "--out=gs://"),
        (["train", "--", "data encode", "--out=gs://a"], "error: 'data encode': of the commands"),
        (["train", "--", "trian", "--workdir=gs://a"], "error: trian: of the commands"),
        (["train", "--", "a\nb", "--workdir=gs://a"], "error: 'a?b': of the commands"),
        (["supervise", "--", "export", "--workdir=gs://a"], "error: export: of the commands"),
        (["supervise", "--", "", "--workdir=gs://a"], "error: '': of the commands"),
        (["supervise", "--", "calibrate", "--config=a", "--out=run.json"], "--out=run.json: a place on gs://"),
        (["logs", "--worker=all"], "--worker=all"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(cloud: Cloud, arguments: list[str], says: str) -> None:
    status, out, err = cloud.run(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("tpu_vm.sh: error: ")
    assert says in err
    assert cloud.calls() == []
    assert not list(cloud.root.rglob("x"))


def test_a_mistake_in_the_env_file_is_told_with_its_line(cloud: Cloud) -> None:
    env = cloud.root / "env"
    for text, says in {
        "\nexport ZONE=a\n": "env:2: KEY=VALUE is expected",
        "ZOEN=a\n": "env:1: there is no setting zoen",
        "DRY_RUN=yes\n": "env:1: there is no setting dry_run",
        "IFS=a\n": "env:1: there is no setting ifs",
    }.items():
        env.write_text(text)
        status, _, err = cloud.run("create", f"--env={env}")
        assert (status, err.count("\n"), says in err) == (2, 1, True), err


def test_without_gcloud_it_says_where_to_get_it(cloud: Cloud, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for tool in ("bash", "env", "readlink", "dirname", "mktemp", "rm"):
        (bare / tool).symlink_to(str(shutil.which(tool)))
    process = cloud.start("status", path=str(bare))
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.count("\n")) == (2, 1)
    assert "no gcloud" in err


def test_many_workers_are_reached_in_batches(cloud: Cloud) -> None:
    cloud.plan["workers"] = 129
    cloud.do("create")
    assert cloud.do("status").count(": not set up\n") == 129
    workers = [argument for call in cloud.calls("ssh", NAME) for argument in call if argument.startswith("--worker=")]
    assert sorted(workers) == ["--worker=0-63", "--worker=128", "--worker=64-127"]
