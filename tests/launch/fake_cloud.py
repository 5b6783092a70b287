"""A cloud in a folder: a `gcloud` on PATH whose machines are home directories, on which the real tpu_worker.sh runs.

`Cloud` makes a small git checkout with the scripts under test, whose launch/local.sh pretends to set up and to train.
The fake gcloud records its arguments, each ended by a NUL, and plays the states that `plan` says. `sleep` sleeps less.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LAUNCH = Path(__file__).parents[2] / "launch"
NAME = "my-tpu"
FLAGS = (f"--name={NAME}", "--zone=us-west4-a", "--accelerator_type=v5litepod-16")
TRAINING = ("--", "--config=configs/a.py", "--workdir=gs://bucket/run")

GCLOUD = r"""
import json, os, pathlib, shutil, signal, subprocess, sys

cloud = pathlib.Path(os.environ["FAKE_CLOUD"])
with (cloud / "calls").open("ab", buffering=0) as file:
    file.write(b"".join(os.fsencode(a) + b"\0" for a in sys.argv[1:]) + b"\n")
plan = json.loads((cloud / "plan.json").read_text())
words = [a for a in sys.argv[1:] if not a.startswith("--")]
flags = dict(a.removeprefix("--").partition("=")[::2] for a in sys.argv[1:] if a.startswith("--"))
words = words[words.index("tpus") + 1 :]
# Of a queued resource; a list names it in its filter.
name = words[2] if len(words) > 2 else flags["filter"].rstrip('$"').rpartition("/")[2]
resource_file = cloud / f"resource.{name}.json"


def fail(message, status=1):
    sys.exit(print(f"ERROR: (gcloud.compute.tpus.{words[0]}.{words[1]}) {message}", file=sys.stderr) or status)


def resource():
    if not resource_file.exists():
        fail(f"NOT_FOUND: Resource 'queuedResources/{name}' was not found")
    return json.loads(resource_file.read_text())


def create():
    if plan["refuse_create"]:
        fail(plan["refuse_create"])
    if resource_file.exists():
        fail("ALREADY_EXISTS: Resource already exists")
    count = int(flags.get("node-count", 1))
    names = [name] if count == 1 else [f"{flags['node-prefix']}-{i}" for i in range(count)]
    creation = len(list(cloud.glob(f"created.{name}.*")))
    (cloud / f"created.{name}.{creation}").touch()
    states = plan["states"][min(creation, len(plan["states"]) - 1)]
    resource_file.write_text(json.dumps({"states": states, "nodes": names}))


def describe():
    if plan["refuse_describe"]:
        fail(plan["refuse_describe"])
    it = resource()
    state = it["states"][0]
    if len(it["states"]) > 1:
        resource_file.write_text(json.dumps({**it, "states": it["states"][1:]}))
    for node in it["nodes"] if state == "ACTIVE" else ():
        if not (cloud / "machines" / node).exists():
            for worker in range(plan["workers"]):
                (cloud / "machines" / node / str(worker)).mkdir(parents=True)
    print(state if "|" in state else f"{state}||")


def delete():
    if plan["refuse_delete"]:
        fail(plan["refuse_delete"])
    if "SUSPENDED" in resource()["states"][0] and "force" not in flags:
        fail("INVALID_ARGUMENT: the queued resource is SUSPENDED")
    for node in resource()["nodes"]:
        for session in cloud.glob(f"machines/{node}/*/offsetjax/runs/*/session"):
            subprocess.run(["pkill", "-KILL", "--session", session.read_text()], check=False)
        shutil.rmtree(cloud / "machines" / node, ignore_errors=True)
    resource_file.unlink()


def list_nodes():
    for node in resource()["nodes"] if resource_file.exists() else []:
        print(f"{node},{plan['node_states'].get(node, 'READY')},{plan['workers']}")


def machines(node):
    if flags["worker"] == "all":
        return [cloud / "machines" / node / str(worker) for worker in range(plan["workers"])]
    first, _, last = flags["worker"].partition("-")
    return [cloud / "machines" / node / str(worker) for worker in range(int(first), int(last or first) + 1)]


def scp():
    node, _, path = words[3].partition(":")
    for machine in machines(node):
        shutil.copy(words[2], machine / path)


def start(machine, drop):
    where = f"{machine.parent.name}/{machine.name}"
    dropped = drop and drop["worker"] == where and drop["word"] in flags["command"]
    if not machine.exists() or (dropped and drop["when"] == "before"):
        print(f"ssh: connect to host {where} port 22: Connection timed out", file=sys.stderr)
        return None
    command = flags["command"]
    if dropped:  # after the command ran: gcloud runs it again
        command = f"{command} >/dev/null; {command}"
    env = {
        "HOME": str(machine),
        "HOSTNAME": f"t1v-n-0a1b2c3d-w-{machine.name}",
        "MACHINE": where,
        "FAKE_CLOUD": str(cloud),
        "PATH": f"{cloud / 'machine_bin'}:{os.environ['PATH']}",
        "OFFSETJAX_TPU_LOCKFILE": str(machine / "libtpu_lockfile"),
    }
    return subprocess.Popen(["bash", "-c", command], env=env, cwd=machine, stdin=subprocess.DEVNULL)


def ssh():
    print("Using ssh batch size of 1. Attempting to SSH into 1 nodes", file=sys.stderr)
    processes = [start(machine, plan["drop"]) for machine in machines(words[2])]
    sys.exit(max(255 if process is None else process.wait() for process in processes))


verbs = {"create": create, "describe": describe, "delete": delete, "list": list_nodes, "scp": scp, "ssh": ssh}
verbs[words[1]]()
"""

LAST_STEP = 12

# Sets up by writing a python that knows its versions.
LOCAL_SH = r"""#!/usr/bin/env bash
set -eu
if [[ $1 == sweep ]]; then exec cat "$FAKE_CLOUD/listing"; fi
me=${MACHINE//\//.}
[[ $OFFSETJAX_EXTRAS == tpu ]]
if [[ $1 != -* ]]; then exec "$FAKE_CLOUD/machine_bin/offsetjax" "$@"; fi
if [[ -e $FAKE_CLOUD/broken.$me ]]; then echo "local.sh: no space left on device" >&2; exit 1; fi
mkdir -p "$OFFSETJAX_VENV/bin"
version=$(cat "$FAKE_CLOUD/version.$me" 2>/dev/null || echo 0.10.2)
printf '#!/bin/sh\ncat >/dev/null\necho python 3.12.3 jax %s\n' "$version" >"$OFFSETJAX_VENV/bin/python"
chmod +x "$OFFSETJAX_VENV/bin/python"
"""

# Trains by counting to LAST_STEP on "gs://", each worker for itself; every fifth step is saved.
OFFSETJAX = r"""
import os, pathlib, signal, sys, time

cloud, me = pathlib.Path(os.environ["FAKE_CLOUD"]), os.environ["MACHINE"].replace("/", ".")
written = cloud / f"new_arguments.{me}"
written.write_bytes(b"".join(os.fsencode(argument) + b"\0" for argument in sys.argv[1:]))
written.replace(cloud / f"arguments.{me}")
(workdir,) = [a.partition("=gs://")[2] for a in sys.argv if a.startswith(("--workdir=gs://", "--out=gs://"))]
folder = cloud / "gs" / workdir
folder.mkdir(parents=True, exist_ok=True)
saved, exits = folder / f"saved.{me}", folder / f"exits.{me}"
signals = []
signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
step = int(saved.read_text()) if saved.exists() else 0
print("training from step", step, flush=True)
while step < LAST_STEP:
    time.sleep(0.03)
    if signals:
        saved.write_text(str(step))
        time.sleep(0.2)
        (folder / f"signals.{me}").write_text(str(len(signals)))
        sys.exit(143)
    codes = exits.read_text().split() if exits.exists() else []
    if codes:
        exits.write_text(" ".join(codes[1:]))
        sys.exit(int(codes[0]))
    if (folder / "hold").exists():
        continue
    step += 1
    with (folder / f"steps.{me}").open("a") as file:
        file.write(f"{step}\n")
    if step % 5 == 0:
        saved.write_text(str(step))
"""

SLEEP = r"""#!/bin/sh
case $1 in 0.*) exec /bin/sleep "$1" ;; esac
echo "$1" >>"$FAKE_CLOUD/sleeps"
exec /bin/sleep 0.05
"""


class Cloud:
    """A checkout with the scripts, and a cloud for them; `plan` says how it behaves."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.processes: list[subprocess.Popen[str]] = []
        self.checkout = root / "a checkout"
        self.plan: dict[str, Any] = {
            "states": [["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]],  # of the first creation, the second, …
            "workers": 1,
            "node_states": {},
            "refuse_create": "",
            "refuse_delete": "",
            "refuse_describe": "",
            "drop": None,
        }
        self._make_checkout()
        self._executable("bin/gcloud", f"#!{sys.executable} -IS\n{GCLOUD}")
        self._executable("bin/sleep", SLEEP)
        offsetjax = OFFSETJAX.replace("LAST_STEP", str(LAST_STEP))
        self._executable("machine_bin/offsetjax", f"#!{sys.executable} -IS\n{offsetjax}")
        self._executable("machine_bin/sudo", '#!/bin/sh\nshift\nexec "$@"\n')
        self._executable("machine_bin/fuser", '#!/bin/sh\ncat "$FAKE_CLOUD/holder"\n')

    def _make_checkout(self) -> None:
        (self.checkout / "launch").mkdir(parents=True)
        for name in ("settings.sh", "slices.sh", "supervise.sh", "sweep.sh", "tpu_vm.sh", "tpu_worker.sh"):
            shutil.copy(LAUNCH / name, self.checkout / "launch")
        self._executable("a checkout/launch/local.sh", LOCAL_SH)
        for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
            self.git(*command)

    def _executable(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def git(self, *args: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *args], cwd=self.checkout, check=True, timeout=60)

    def start(self, *args: str, path: str = "", **environment: str) -> subprocess.Popen[str]:
        """Starts tpu_vm.sh; with no settings but the name, the zone and the type, unless `args` has some."""
        command, *rest = args
        return self.start_script("tpu_vm.sh", command, *FLAGS, *rest, path=path, **environment)

    def start_script(self, script: str, *args: str, path: str = "", **environment: str) -> subprocess.Popen[str]:
        """Starts a script of `launch/` in this cloud."""
        self.write_plan()
        ours = {name: value for name, value in os.environ.items() if not name.startswith("OFFSETJAX_")}
        ours |= {
            "PATH": path or f"{self.root / 'bin'}:{os.environ['PATH']}",
            "FAKE_CLOUD": str(self.root),
            "OFFSETJAX_POLL_SECONDS": "0.02",
            "OFFSETJAX_GRACE_SECONDS": "1",
        }
        process = subprocess.Popen(
            [str(self.checkout / "launch" / script), *args],
            cwd=self.root,
            env=ours | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def close(self) -> None:
        """Ends all that was started, here and on the machines."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate(timeout=60)
        self.kill_machines()

    def write_plan(self) -> None:
        """Makes a changed `plan` known; `start` does so too."""
        new = self.root / "plan.json.new"
        new.write_text(json.dumps(self.plan))
        new.replace(self.root / "plan.json")

    def run(self, *args: str, **environment: str) -> tuple[int, str, str]:
        process = self.start(*args, **environment)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def do(self, *args: str, **environment: str) -> str:
        """`run`, for a command that has to succeed; returns its output."""
        status, out, err = self.run(*args, **environment)
        assert status == 0, err
        return out

    def be_ready(self, *flags: str) -> None:
        """Slices that are there and set up."""
        self.do("create", *flags)
        self.do("setup", *flags)

    def calls(self, *words: str) -> list[list[str]]:
        """The arguments of each call of gcloud that has all these among them."""
        lines = (self.root / "calls").read_bytes().split(b"\0\n")[:-1] if (self.root / "calls").exists() else []
        calls = [[os.fsdecode(argument) for argument in line.split(b"\0")] for line in lines]
        return [call for call in calls if set(words) <= set(call)]

    def file(self, name: str) -> Path:
        return self.root / name

    def steps(self, worker: str) -> list[int]:
        """The steps that a worker's trainings made, in their order."""
        file = self.file(f"gs/bucket/run/steps.{worker}")
        return [int(line) for line in file.read_text().split()] if file.exists() else []

    def wait_for(self, what: Callable[[], object], seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, "it did not come"
            time.sleep(0.05)

    def kill_machines(self, pattern: str = "*/*") -> None:
        """What a loss of power does: no process lives on, nothing is written any more."""
        for session in self.root.glob(f"machines/{pattern}/offsetjax/runs/*/session"):
            subprocess.run(["pkill", "-KILL", "--session", session.read_text().strip()], check=False, timeout=60)

    def preempt(self) -> None:
        """Spot: the machines are gone first, and the queued resource says so a little later."""
        self.kill_machines()
        (self.root / "machines").rename(self.root / "gone")
        it = json.loads((self.root / f"resource.{NAME}.json").read_text())
        it["states"] = ["SUSPENDING|SERVICE|", "SUSPENDED|SERVICE|"]
        (self.root / f"resource.{NAME}.json").write_text(json.dumps(it))
