#!/usr/bin/env bash
# Runs the command `offsetjax` in .venv, which it makes at the first use and again whenever its requirements change.
#
#   launch/local.sh train --config=my.py       any arguments of offsetjax; paths are relative to the current directory
#   launch/local.sh --processes=4 train …      as on a pod: 4 processes that train as one, on this machine's CPU;
#                                              calibrate and data encode too
#   launch/local.sh --restarts=10 train …      starts it again, after a pause, where that may help (exit status 75, 70, or
#                                              killed); goes before or after --processes
#   launch/local.sh test                       lint, format, types, shell scripts, then the quick tests
#   launch/local.sh test tests/launch -x       only pytest, with these arguments, at the root of the repository
#
# Of several processes, process 0 has the terminal; what the others print is marked with their number.
# JAX_NUM_CPU_DEVICES=2 gives each as many devices. A signal, SIGTERM or Ctrl-C, goes to all.
#
#   PYTHON                  the Python to make .venv from, 3.11 to 3.13; the default is the first that works
#   OFFSETJAX_EXTRAS        extras of pyproject.toml, such as "tpu"; the default is "cuda" where there is an nvidia-smi
#   OFFSETJAX_TORCH_INDEX   one more package index, for the CPU build of PyTorch that `test` wants
#   OFFSETJAX_VENV          another place for .venv
set -euo pipefail

root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
venv=${OFFSETJAX_VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
name=${venv#"$root"/}
# Written last, so that a set-up that did not come to its end is never taken for whole. Line 1: extras; then: identity.
stamp=$venv/offsetjax-stamp

default_extras=""
if command -v nvidia-smi >/dev/null; then default_extras=cuda; fi
extras=${OFFSETJAX_EXTRAS-$default_extras}
if [[ ${1-} == test ]]; then extras=${extras:+$extras,}test; fi

say() { printf 'local.sh: %s\n' "$*" >&2; }

processes=1 restarts=0
while [[ ${1-} == --processes=* || ${1-} == --restarts=* ]]; do
  if [[ $1 == --restarts=* ]]; then
    restarts=${1#*=}
    shift
    if [[ ! $restarts =~ ^[0-9]{1,4}$ ]]; then
      say "--restarts=N, from 0 to 9999: launch/local.sh --restarts=10 train …"
      exit 2
    fi
    continue
  fi
  processes=${1#*=}
  shift
  if [[ ! $processes =~ ^[1-9][0-9]{0,2}$ || ! (${1-} =~ ^(train|calibrate)$ || "${1-} ${2-}" == "data encode") ]]; then
    say "--processes=N, from 1 to 999, goes before train, calibrate or data encode: launch/local.sh --processes=4 train …"
    exit 2
  fi
done

find_python() {
  local candidate candidates=(python3.11 python3.12 python3.13 python3)
  if [[ -n ${PYTHON-} ]]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    # Running it is the only proof: pyenv puts commands on the path that fail, Debian ships Pythons without ensurepip.
    if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' &>/dev/null; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  say "no Python 3.11 to 3.13 with venv and ensurepip${PYTHON:+ in PYTHON=$PYTHON}: install one, or name one in PYTHON"
  return 2
}

# All that the environment is made from; its own place too, for an environment does not survive a move.
identity() { # python
  printf '%s\n' "$venv" "$root"
  "$1" -c 'import sys; print(sys.version)' 2>/dev/null || return
  cat "$root/pyproject.toml" "$root/launch/constraints.txt"
}

is_current() {
  [[ -x $venv/bin/python && -f $stamp && $(tail -n +2 "$stamp") == "$(identity "${PYTHON:-$venv/bin/python}")" ]]
}

has_extras() {
  local extra installed
  installed=$(head -n 1 "$stamp")
  for extra in ${extras//,/ }; do [[ ,$installed, == *,$extra,* ]] || return; done
}

install() { # python
  "$venv/bin/python" -m pip install --disable-pip-version-check --constraint "$root/launch/constraints.txt" \
    ${OFFSETJAX_TORCH_INDEX:+--extra-index-url "$OFFSETJAX_TORCH_INDEX"} --editable "$root${extras:+[$extras]}" &&
    { printf '%s\n' "$extras" && identity "$1"; } >"$stamp.new" && mv "$stamp.new" "$stamp"
}

set_up() {
  local python reason="first use" log=$venv.log
  python=$(find_python)
  mkdir -p "$(dirname "$venv")"
  exec 9>"$venv.lock"
  # Python's flock, as not every system has the command; the lock belongs to descriptor 9 and lasts as long.
  if ! "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null; then
    say "waiting for another set-up of $name…"
    "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
  fi
  if is_current && has_extras; then
    exec 9>&-
    return
  fi
  if is_current; then
    reason="more extras"
    extras=$(head -n 1 "$stamp"),$extras
    extras=${extras#,}
    rm "$stamp"
  elif [[ -e $venv ]]; then
    if [[ ! -f $venv/pyvenv.cfg ]]; then
      say "$venv is not a virtual environment: remove it, or name another place in OFFSETJAX_VENV"
      exit 2
    fi
    reason="an unfinished one or new requirements"
    rm -rf "$venv"
  fi
  say "setting up $name ($reason, a few minutes)…"
  if ! { { [[ -d $venv ]] || "$python" -m venv "$venv"; } && install "$python"; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    say "setting up $name failed; the whole log is $log"
    exit 1
  fi
  exec 9>&-
  say "$name is ready after $SECONDS s"
}

if ! { is_current && has_extras; }; then set_up; fi

free_port() { "$venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }

heard="" pids=()

# Runs the command in one or several processes; returns the status that says most: a mistake, storage, saved, a fault.
together() { # arguments...
  local i pid status statuses=""
  pids=()
  # They end when this shell has gone, as by SIGKILL.
  export OFFSETJAX_PARENT=$$
  if ((processes > 1)); then
    export JAX_PLATFORMS=cpu JAX_NUM_PROCESSES=$processes
    JAX_COORDINATOR_ADDRESS=localhost:$(free_port)
    export JAX_COORDINATOR_ADDRESS
  fi
  # Each in a process group of its own, so that a terminal's Ctrl-C comes once, and is not ignored as in the background.
  set -m
  for i in TERM INT HUP QUIT; do
    # shellcheck disable=SC2064
    trap "heard=$i; kill -$i \"\${pids[@]}\" 2>/dev/null || true" "$i"
  done
  for ((i = 0; i < processes; i++)); do
    if ((processes == 1)); then
      "$venv/bin/offsetjax" "$@" &
    elif ((i == 0)); then
      JAX_PROCESS_ID=0 "$venv/bin/offsetjax" "$@" &
    else
      JAX_PROCESS_ID=$i "$venv/bin/offsetjax" "$@" > >(sed -u "s/^/[$i] /" >&2) 2>&1 &
    fi
    pids+=("$!")
  done
  # One that came while they were being started has not reached all of them.
  [[ -z $heard ]] || kill -"$heard" "${pids[@]}" 2>/dev/null || true
  for pid in "${pids[@]}"; do
    while :; do # a signal to this shell interrupts `wait`
      status=0
      wait "$pid" || status=$?
      kill -0 "$pid" 2>/dev/null || break
    done
    statuses+=" $status"
  done
  for status in 2 74 143 130 70 75 $statuses; do
    if ((status)) && [[ "$statuses " == *" $status "* ]]; then return "$status"; fi
  done
}

# The same, again after a pause where that may help, until it has failed so often.
supervised() { # arguments...
  local status failures=0 seconds=${OFFSETJAX_PAUSE_SECONDS:-10}
  unset OFFSETJAX_PAUSE_SECONDS
  while :; do
    status=0
    together "$@" || status=$?
    case $status in 0 | 2 | 74 | 129 | 130 | 143) return "$status" ;; esac
    if [[ -n $heard ]] || ((++failures > restarts)); then return "$status"; fi
    say "exit status $status; starting again in $seconds s (failure $failures of at most $restarts)"
    sleep "$seconds" &
    wait "$!" || true # a signal ends the pause
    [[ -z $heard ]] || return "$status"
    seconds=$((seconds < 300 ? 2 * seconds : 600))
  done
}

if ((processes > 1 || restarts > 0)); then
  status=0
  supervised "$@" || status=$?
  exit "$status"
fi
if [[ ${1-} != test ]]; then exec "$venv/bin/offsetjax" "$@"; fi

shift
cd "$root"
PATH=$venv/bin:$PATH
if (($# == 0)); then
  ruff check .
  ruff format --check .
  mypy
  shellcheck launch/*.sh .ci/*
  # Two processes, for most of a test keeps one core busy; whole files, which share what they have trained, and in their
  # order, for the first takes the longest.
  set -- --numprocesses=2 --dist=loadfile --no-loadscope-reorder
fi
exec python -m pytest "$@"
