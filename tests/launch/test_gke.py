"""launch/gke.sh: the JobSet that it fills in, against the fields that JobSet and Kubernetes know; xpk's command."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

GKE_SH = Path(__file__).parents[2] / "launch" / "gke.sh"
COMMON = ("--name=my-run", "--image=us-docker.pkg.dev/p/r/offsetjax:1", "--node_count=2")
MANIFEST = (*COMMON, "--accelerator=tpu-v5-lite-podslice", "--topology=4x4")
XPK = (*COMMON, "--cluster=my-cluster", "--zone=us-west4-a", "--tpu_type=v5litepod-16")
TRAINING = ("--", "--config=configs/sd15_offset.py", "--workdir=gs://bucket/run")

# What may stand where, of jobset.x-k8s.io/v1alpha2, batch/v1 and v1: a field ending in "!" must be there.
RESTARTS = {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}
POD: dict[str, Any] = {
    "restartPolicy!": {"Never"},  # the only one that podFailurePolicy allows
    "terminationGracePeriodSeconds!": int,
    "serviceAccountName": str,
    "hostNetwork": bool,
    "dnsPolicy": {"ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"},
    "nodeSelector!": {str: str},
    "tolerations": [{"key": str, "operator": {"Exists", "Equal"}, "effect": {"NoSchedule", "NoExecute"}}],
    "containers!": [
        {
            "name!": str,
            "image!": str,
            "command": [str],
            "args": [str],
            "env": [{"name!": str, "value": str}],
            "ports": [{"containerPort!": int}],
            "securityContext": {"privileged": bool},
            "resources!": {"limits!": {"google.com/tpu!": int}},
            "volumeMounts": [{"name!": str, "mountPath!": str}],
        }
    ],
    "volumes": [{"name!": str, "emptyDir": {"medium": {"Memory", ""}}}],
}
JOB: dict[str, Any] = {
    "parallelism!": int,
    "completions!": int,
    "completionMode": {"Indexed"},
    "backoffLimit!": int,
    "podFailurePolicy": {
        "rules!": [
            {
                "action!": {"FailJob", "Ignore", "Count"},
                "onExitCodes": {"containerName": str, "operator!": {"In", "NotIn"}, "values!": [int]},
            }
        ]
    },
    "template!": {"spec!": POD},
}
JOBSET: dict[str, Any] = {
    "apiVersion!": {"jobset.x-k8s.io/v1alpha2"},
    "kind!": {"JobSet"},
    "metadata!": {"name!": str, "namespace": str, "annotations": {str: str}},
    "spec!": {
        "ttlSecondsAfterFinished": int,
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [{"name!": str, "action!": RESTARTS, "onJobFailureReasons": [{"PodFailurePolicy"}]}],
        },
        "replicatedJobs!": [{"name!": str, "replicas": int, "template!": {"spec!": JOB}}],
    },
}


def check(value: Any, schema: Any, where: str = "") -> None:
    """Raises AssertionError, with the place, unless the value is what the schema allows."""
    if isinstance(schema, set):
        assert value in schema, f"{where}: {value!r} is none of {schema}"
    elif isinstance(schema, type):
        assert type(value) is schema, f"{where}: {value!r} is no {schema.__name__}"
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, f"{where}: {value!r} is no list with something in it"
        for i, item in enumerate(value):
            check(item, schema[0], f"{where}[{i}]")
    else:
        assert isinstance(value, dict), f"{where}: {value!r} is no mapping"
        free = schema.get(str)
        known = {} if free else {key.removesuffix("!"): rule for key, rule in schema.items()}
        missing = {key.removesuffix("!") for key in schema if key is not str and key.endswith("!")} - value.keys()
        assert not missing, f"{where}: without {missing}"
        for key, item in value.items():
            assert free or key in known, f"{where}: no such field {key}"
            check(item, free or known[key], f"{where}.{key}")


def run(*args: str, path: str = "", cwd: Path | None = None) -> tuple[int, str, str]:
    environment = os.environ | ({"PATH": path} if path else {})
    done = subprocess.run([GKE_SH, *args], env=environment, cwd=cwd, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def manifest(*args: str) -> dict[str, Any]:
    status, out, err = run("manifest", *args)
    assert (status, err) == (0, "")
    jobset: dict[str, Any] = yaml.safe_load(out)
    check(jobset, JOBSET)
    return jobset


def pod_of(jobset: dict[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    return pod


@pytest.mark.parametrize(
    ("flags", "hosts", "chips"),
    [
        (("--topology=4x4",), 4, 4),
        (("--topology=2x4", "--chips_per_host=8"), 1, 8),
        (("--topology=2x2x1", "--accelerator=tpu-v5p-slice"), 1, 4),
        (("--topology=16x20x28", "--accelerator=tpu-v5p-slice"), 2240, 4),
    ],
)
def test_a_slice_is_a_job_of_as_many_pods_as_it_has_hosts(flags: tuple[str, ...], hosts: int, chips: int) -> None:
    jobset = manifest(*MANIFEST, *flags, *TRAINING)
    (slices,) = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert (slices["replicas"], job["parallelism"], job["completions"]) == (2, hosts, hosts)
    (container,) = pod_of(jobset)["containers"]
    assert container["resources"]["limits"]["google.com/tpu"] == chips
    assert container["command"] + container["args"] == ["offsetjax", "train", *TRAINING[1:]]


def test_a_mistake_fails_the_whole_and_anything_else_starts_it_again() -> None:
    jobset = manifest(*MANIFEST, "--max_restarts=7", *TRAINING)
    policy, job = jobset["spec"]["failurePolicy"], jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    # One failed pod is a failed Job, which restarts all of them unless a rule says otherwise; the only rule is for 2.
    assert (job["backoffLimit"], policy["maxRestarts"]) == (0, 7)
    (pod_rule,) = job["podFailurePolicy"]["rules"]
    assert pod_rule["onExitCodes"] == {
        "containerName": pod_of(jobset)["containers"][0]["name"],
        "operator": "In",
        "values": [2, 74],
    }
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_there_is_time_to_save_before_the_end() -> None:
    assert pod_of(manifest(*MANIFEST, *TRAINING))["terminationGracePeriodSeconds"] == 600
    assert pod_of(manifest(*MANIFEST, "--grace_seconds=1800", *TRAINING))["terminationGracePeriodSeconds"] == 1800


def test_arguments_reach_the_training_exactly() -> None:
    odd = [
        "--config=a \"b\" 'c' \\d $e ${HOSTS} ${NAME} & `f` %g # h: i",
        "--workdir=gs://bucket/run",
        "",
        "no",
        "é",
        "- x",
    ]
    assert expanded(pod_of(manifest(*MANIFEST, "--", *odd))["containers"][0]["args"]) == ["train", *odd]
    dollars = ["--config.a=$(HOME)", "--config.a=a$$b", "--config.a=$$(HOME)$", "--config.a=$$$"]
    found = pod_of(manifest(*MANIFEST, *TRAINING, *dollars))["containers"][0]["args"]
    assert expanded(found)[-4:] == dollars


def expanded(arguments: list[str]) -> list[str]:
    """As Kubernetes expands them: `$$` is one dollar, `$(HOME)` a variable's value, any other dollar itself."""
    return [re.sub(r"\$\$|\$\(\w+\)", lambda found: "$" if found[0] == "$$" else "VALUE", text) for text in arguments]


def test_words_that_yaml_would_take_for_something_else_stay_words() -> None:
    jobset = manifest(*MANIFEST, "--name=no", "--namespace=1e3", "--service_account=null", *TRAINING)
    assert jobset["metadata"]["name"] == "no"
    assert jobset["metadata"]["namespace"] == "1e3"
    assert pod_of(jobset)["serviceAccountName"] == "null"


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (("maxRestarts", "maxRestart"), "no such field maxRestart"),
        (("restartPolicy: Never", "restartPolicy: OnFailure"), "'OnFailure' is none of"),
        (("replicas: 2", 'replicas: "2"'), "'2' is no int"),
        (("          backoffLimit: 0\n", ""), "without {'backoffLimit'}"),
    ],
)
def test_the_check_itself_finds_faults(broken: tuple[str, str], says: str) -> None:
    _, out, _ = run("manifest", *MANIFEST, *TRAINING)
    assert broken[0] in out
    with pytest.raises(AssertionError, match=says.replace("'", ".").replace("{", ".").replace("}", ".")):
        check(yaml.safe_load(out.replace(*broken)), JOBSET)


def test_xpk_gets_the_same_rules(tmp_path: Path) -> None:
    (tmp_path / "xpk").write_text('#!/bin/sh\nprintf "%s\\0" "$@" >xpk_arguments\n')
    (tmp_path / "xpk").chmod(0o755)
    odd = ("--config.a=it's $(touch pasted)",)
    status, out, err = run(
        "xpk", *XPK, "--project=p", *TRAINING, *odd, path=f"{tmp_path}:{os.environ['PATH']}", cwd=tmp_path
    )
    assert (status, out, err) == (0, "", "")
    *arguments, command = (tmp_path / "xpk_arguments").read_text().split("\0")[:-1]
    assert arguments == [
        "workload",
        "create",
        "--cluster=my-cluster",
        "--zone=us-west4-a",
        "--project=p",
        "--workload=my-run",
        "--tpu-type=v5litepod-16",
        "--num-slices=2",
        "--docker-image=us-docker.pkg.dev/p/r/offsetjax:1",
        "--max-restarts=20",
        "--restart-on-exit-codes=1,3-73,75-126",
        "--termination-grace-period-seconds=600",
    ]
    # The command as the container's shell runs it.
    echo = command.removeprefix("--command=").replace("exec offsetjax", "printf '%s\\0'", 1)
    shell = subprocess.run(["bash", "-euc", echo], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert shell.stdout.split("\0")[:-1] == ["train", *TRAINING[1:], *odd]
    assert not (tmp_path / "pasted").exists()


def test_a_dry_run_for_xpk_can_be_pasted(tmp_path: Path) -> None:
    status, out, _ = run("xpk", "--dry_run", *XPK, *TRAINING)
    assert (status, out) == (
        0,
        "xpk workload create --cluster=my-cluster --zone=us-west4-a --workload=my-run --tpu-type=v5litepod-16"
        " --num-slices=2 --docker-image=us-docker.pkg.dev/p/r/offsetjax:1 --max-restarts=20"
        " --restart-on-exit-codes=1,3-73,75-126 --termination-grace-period-seconds=600"
        " '--command=exec offsetjax train --config=configs/sd15_offset.py --workdir=gs://bucket/run'\n",
    )
    env = tmp_path / "env"
    env.write_text(
        "\n".join(flag.removeprefix("--").partition("=")[0].upper() + "=" + flag.partition("=")[2] for flag in XPK)
    )
    assert run("xpk", "--dry_run", f"--env={env}", *TRAINING) == (0, out, "")


def test_without_xpk_it_says_where_to_get_it(tmp_path: Path) -> None:
    for tool in ("bash", "env", "readlink", "dirname"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    status, _, err = run("xpk", *XPK, *TRAINING, path=str(tmp_path))
    assert (status, err) == (2, "gke.sh: error: no xpk: pip install xpk\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "manifest or xpk"),
        (("apply", *MANIFEST, *TRAINING), "manifest or xpk"),
        (("manifest", *MANIFEST), "arguments follow --"),
        (("manifest", *MANIFEST, "--", "--config=a", "--workdir=run"), "gs://"),
        (("manifest", *COMMON, *TRAINING), "--accelerator is missing"),
        (("manifest", *MANIFEST, "--topology=4", *TRAINING), "4x4"),
        (("manifest", *MANIFEST, "--topology=2x3", *TRAINING), "6 chips"),
        (("manifest", *MANIFEST, '--image=a", b: "c', *TRAINING), "--image="),
        (("manifest", *MANIFEST, "--name=a b", *TRAINING), "--name='a b'"),
        (("manifest", *MANIFEST, "--", "--workdir=gs://a", "--config=a\nb"), "control character"),
        (("xpk", *COMMON, *TRAINING), "--cluster is missing"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    status, out, err = run(*arguments, cwd=tmp_path)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("gke.sh: error: ")
    assert says in err
