#!/usr/bin/env bash
# One worker's part of tpu_vm.sh, which copies this checkout to ~/offsetjax/source on every worker and calls it there.
#
#   tpu_worker.sh setup [COMMAND]           sets up ~/offsetjax/venv, runs COMMAND, and answers with the versions
#   tpu_worker.sh start RUN ARGUMENTS…      starts `offsetjax [train] ARGUMENTS…`, which outlives the connection
#   tpu_worker.sh status                    what runs here, or how the last run ended
#   tpu_worker.sh stop RUN [now]            SIGTERM, for the checkpoint to be saved; or SIGKILL to all of the run
#   tpu_worker.sh log [follow]              the last run's output
#
# An answer is one line, "offsetjax WORKER …": the output of all workers comes mixed, and a worker that was not reached
# shows only by its silence, so that tpu_vm.sh counts the answers. gcloud repeats a command whose connection broke; each
# of these may be repeated.
set -euo pipefail

base=$HOME/offsetjax
runs=$base/runs
lockfile=${OFFSETJAX_TPU_LOCKFILE:-/tmp/libtpu_lockfile}
python_version=3.12 # where the machine has none that will do
uv_version=0.13.9

# The hosts of a slice are called t1v-n-0123abcd-w-0, -w-1 and so on.
answer() { printf 'offsetjax %s %s\n' "${HOSTNAME##*-w-}" "$*"; }

last_run() { cat "$runs/last" 2>/dev/null; }

# The run holds the lock as long as any process of it lives, however it ends: a crash or a reboot leaves nothing behind.
is_free() { flock --nonblock "$base/lock" true; }

local_sh() { OFFSETJAX_VENV=$base/venv OFFSETJAX_EXTRAS=tpu "$base/source/launch/local.sh" "$@"; }

# Ubuntu 22.04, which TPU VMs run, has Python 3.10.
install_python() {
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --user --quiet "uv==$uv_version" &&
    "$HOME/.local/bin/uv" python install "$python_version"
}

set_up() {
  local status=0
  local_sh --help || status=$?
  if ((status == 2)); then # it found no Python
    install_python && PYTHON=$("$HOME/.local/bin/uv" python find "$python_version") local_sh --help
    return
  fi
  return "$status"
}

versions() {
  "$base/venv/bin/python" - <<'PYTHON'
import platform
from importlib.metadata import version

names = ("offsetjax", "jax", "jaxlib", "libtpu")
print("python", platform.python_version(), *(f"{name} {version(name)}" for name in names))
PYTHON
}

setup() { # [command]
  local log=$base/setup.log
  if { set_up && (cd "$base" && bash -euc "${1-}") && versions >"$base/versions"; } >"$log" 2>&1; then
    answer "ready $(cat "$base/versions") source $(cksum <"$HOME/offsetjax.tar.gz" | cut -d ' ' -f 1)"
  else
    answer "failed $(grep . "$log" | tail -n 1) (the whole log is $log)"
  fi
}

# Processes of anyone that have the TPU open; those of others show only to root.
holders() {
  { sudo -n fuser "$lockfile" /dev/accel* /dev/vfio/[0-9]* 2>/dev/null || true; } | xargs -n 1 | sort -u | xargs
}

start() { # run arguments...
  local run=$1 held
  if [[ -d $runs/$run ]]; then
    status
    return
  fi
  mkdir -p "$runs"
  exec 9>>"$base/lock"
  if ! flock --wait 5 9; then
    answer "busy with run $(last_run)"
    return
  fi
  held=$(holders)
  if [[ -n $held ]]; then
    answer "busy: the TPU is held by process $held, which is none of offsetjax's"
    return
  fi
  rm -f "$lockfile" 2>/dev/null || sudo -n rm -f "$lockfile" # left by a crash; with it there, libtpu does not start
  mkdir "$runs/$run"
  printf '%s\n' "$run" >"$runs/last"
  setsid "${BASH_SOURCE[0]}" _run "$@" </dev/null >"$runs/$run/log" 2>&1 &
  for _ in {1..100}; do
    if [[ -s $runs/$run/pid ]]; then break; fi
    sleep 0.05
  done
  exec 9>&-
  status
}

# The detached part: the leader of a session. It has descriptor 9, the lock, from `start`, and so has all that it starts.
run() { # run arguments...
  local run=$1 status=0
  shift
  cd "$base/source"
  printf '%s\n' "$$" >"$runs/$run/session"
  # A signal to all processes, as when the machine goes down, must not end this shell before it wrote how the run ended.
  trap : TERM INT HUP QUIT
  (
    printf '%s\n' "$BASHPID" >"$runs/$run/pid"
    export OFFSETJAX_VENV=$base/venv OFFSETJAX_EXTRAS=tpu
    if [[ $1 == --* ]]; then set -- train "$@"; fi
    exec launch/local.sh "$@"
  ) || status=$?
  record "$run" "$status"
}

record() { # run status
  printf '%s\n' "$2" >"$runs/$1/status.new"
  mv "$runs/$1/status.new" "$runs/$1/status"
}

status() {
  local run how
  if ! run=$(last_run); then
    answer idle
    return
  fi
  if ! is_free; then how="running $run"
  elif [[ -f $runs/$run/status ]]; then how="ended $run $(cat "$runs/$run/status")"
  else how="lost $run"; fi
  if [[ -f $runs/$run/stopped ]]; then how+=" stopped"; fi
  answer "$how"
}

stop() { # run [now]
  local run=$1
  if [[ $run == last ]]; then run=$(last_run) || run=""; fi
  if [[ -n $run && $(last_run) == "$run" ]] && ! is_free; then
    if [[ ${2-} == now ]]; then
      touch "$runs/$run/stopped"
      pkill -KILL --session "$(cat "$runs/$run/session")" || true
      for _ in {1..50}; do
        if is_free; then break; fi
        sleep 0.1
      done
      [[ -f $runs/$run/status ]] || record "$run" 137
    # Once only: a second SIGTERM would end it before the checkpoint is saved.
    elif [[ ! -f $runs/$run/stopped ]]; then
      touch "$runs/$run/stopped"
      kill -TERM "$(cat "$runs/$run/pid")" || true
    fi
  fi
  status
}

log() { # [follow]
  local run
  run=$(last_run) || { answer idle; return; }
  if [[ ${1-} == follow ]]; then exec tail -n 100 --pid="$(cat "$runs/$run/session")" -F "$runs/$run/log"; fi
  exec cat "$runs/$run/log"
}

mkdir -p "$base"
case ${1-} in
  setup | start | status | stop | log) "$@" ;;
  _run) run "${@:2}" ;;
  *)
    printf 'tpu_worker.sh: error: it is called by tpu_vm.sh\n' >&2
    exit 2
    ;;
esac
