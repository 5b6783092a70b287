#!/usr/bin/env bash
# Trains on Cloud TPU VMs, one slice or several, through gcloud and its queued resources. The manual: launch/README.md.
#
#   launch/tpu_vm.sh create    --env=FILE                    asks for the slices, and waits until they are there
#   launch/tpu_vm.sh setup     --env=FILE                    copies this checkout to every worker, and sets it up there
#   launch/tpu_vm.sh train     --env=FILE -- ARGUMENTS…      starts `offsetjax train ARGUMENTS…` everywhere; prints the run
#   launch/tpu_vm.sh status    --env=FILE                    the state of the slices, and of the training on each worker
#   launch/tpu_vm.sh logs      --env=FILE [--slice=0] [--worker=0] [--follow]
#   launch/tpu_vm.sh stop      --env=FILE [--now]            saves and ends the training; --now kills it without saving
#   launch/tpu_vm.sh delete    --env=FILE --yes              gives the slices back, with their disks
#   launch/tpu_vm.sh supervise --env=FILE -- ARGUMENTS…      all of it, again and again, until the training is done
#
# `train` and `supervise` also run what else works on several workers: -- data encode ARGUMENTS…, -- calibrate ARGUMENTS…
# The settings below are flags, --node_count=2, or lines of FILE, NODE_COUNT=2. --dry_run prints commands and runs none.
# Exit status: 0; 1 where trying again may help; 2 for what only the user can mend; 74 for storage that needs a person;
# 143 for a run that `stop` ended.
set -euo pipefail

root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
settings="name zone project accelerator_type runtime_version node_count tier create_flags ssh slice worker wait_minutes"
settings+=" stop_minutes max_restarts prepare"
switches="dry_run yes now follow"

name="" zone="" accelerator_type=""
project=""             # gcloud's own by default
runtime_version=""     # follows from the type
node_count=1           # slices
tier=spot              # spot, reserved or on_demand
create_flags=""        # more flags for `queued-resources create`, such as --internal-ips
prepare=""             # a command for every worker in ~/offsetjax, after the set-up: to fetch data, for instance
ssh=external           # external addresses, internal ones, or iap
slice=0 worker=0       # of logs
wait_minutes=720       # for the slices
stop_minutes=30        # for the last checkpoint
max_restarts=10        # in a row; a run of an hour starts the count anew
dry_run=no yes=no now=no follow=no

# For tests: seconds between two looks; until a training that lost peers is ended; of the first pause; of a good run.
poll=${OFFSETJAX_POLL_SECONDS:-30} grace=${OFFSETJAX_GRACE_SECONDS:-300}
pause=${OFFSETJAX_PAUSE_SECONDS:-30} steady=${OFFSETJAX_STEADY_SECONDS:-3600}

batch=64 # connections that gcloud opens at once
worker_sh=offsetjax/source/launch/tpu_worker.sh

# shellcheck source=launch/settings.sh
source "$root/launch/settings.sh"
# shellcheck source=launch/slices.sh
source "$root/launch/slices.sh"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

check_settings() {
  local setting
  must_match name '[a-z]([a-z0-9-]{0,48}[a-z0-9])?' my-tpu
  must_match zone '[a-z0-9]+(-[a-z0-9]+)+' us-west4-a
  [[ -z $project ]] || must_match project '[a-z0-9.:-]+' my-project
  must_match node_count '[1-9][0-9]*' 2
  must_match tier 'spot|reserved|on_demand' spot
  must_match ssh 'external|internal|iap' iap
  for setting in slice worker wait_minutes stop_minutes max_restarts; do
    must_match "$setting" '0|[1-9][0-9]{0,5}' 3
  done
  where=("--zone=$zone" ${project:+"--project=$project"})
  qr=(gcloud compute tpus queued-resources) vm=(gcloud compute tpus tpu-vm) route=()
  case $ssh in
    internal) route=(--internal-ip) ;;
    iap) vm=(gcloud alpha compute tpus tpu-vm) route=(--tunnel-through-iap) ;;
  esac
  [[ $dry_run == yes ]] || command -v gcloud >/dev/null ||
    mistake "no gcloud: see https://cloud.google.com/sdk/docs/install"
}

create() {
  assumed=ABSENT
  describe || refused "$reason"
  if [[ $state == ABSENT ]]; then request; else say "$name is there already"; fi
  assumed=ACTIVE
  wait_until_active
}

check_type() {
  must_match accelerator_type '(v[2-4]|v5litepod|v5p|v6e)-[0-9]+' v5litepod-8
  if [[ -z $runtime_version ]]; then
    case $accelerator_type in
      v6e-*) runtime_version=v2-alpha-tpuv6e ;;
      v5p-*) runtime_version=v2-alpha-tpuv5 ;;
      v5litepod-*) runtime_version=v2-alpha-tpuv5-lite ;;
      *) runtime_version=tpu-ubuntu2204-base ;;
    esac
  fi
  must_match runtime_version '[a-z0-9.-]+' tpu-ubuntu2204-base
}

request() {
  local extra flags=("--node-id=$name")
  if ((node_count > 1)); then flags=("--node-count=$node_count" "--node-prefix=$name"); fi
  flags+=("--accelerator-type=$accelerator_type" "--runtime-version=$runtime_version")
  case $tier in
    spot) flags+=(--spot) ;;
    reserved) flags+=(--reserved) ;;
  esac
  read -ra extra <<<"$create_flags"
  flags+=(${extra[@]+"${extra[@]}"})
  run "${qr[@]}" create "$name" "${where[@]}" "${flags[@]}" 2>"$scratch/err" || refused "$(complaint)"
}

wait_until_active() {
  local began=$SECONDS reported=-600 shown="" failed=0
  while :; do
    if describe; then failed=0; else ((++failed < 10)) || give_up "$reason"; fi
    case $state in
      ACTIVE)
        say "$name is ACTIVE"
        return
        ;;
      FAILED | SUSPENDED | SUSPENDING | ABSENT)
        error "$name is $state${reason:+ ($reason)}: $(remedy_of "$state")"
        if is_final "$reason"; then exit 2; else exit 1; fi
        ;;
    esac
    if [[ $state != "$shown" ]] || ((SECONDS - reported >= 600)); then
      say "$name is $state after $(((SECONDS - began) / 60)) min"
      shown=$state reported=$SECONDS
    fi
    ((SECONDS - began < wait_minutes * 60)) ||
      give_up "$name is still $state after $wait_minutes min: it stays queued, and is billed once it is there;" \
        "\`create\` waits on, \`delete --yes\` gives up"
    sleep "$poll"
  done
}

# Sets archive: this checkout as it stands, without what git does not track.
pack() {
  local commit=HEAD extra
  archive=${OFFSETJAX_ARCHIVE:-$scratch/offsetjax.tar.gz}
  if [[ -n ${OFFSETJAX_ARCHIVE-} ]]; then return; fi
  if [[ $dry_run == yes ]]; then
    archive=offsetjax.tar.gz
  else
    extra=$(git -C "$root" ls-files --others --exclude-standard --directory) ||
      mistake "$root is not a git checkout: clone one"
    [[ -z $extra ]] || say "not copied, because git does not track it: $(head -n 5 <<<"$extra" | xargs)"
    # A commit of the changes that are not committed, on no branch; nothing where there are none.
    commit=$(git -C "$root" -c user.name=offsetjax -c user.email=offsetjax@localhost stash create)
  fi
  run git -C "$root" archive --format=tar.gz --output="$archive" "${commit:-HEAD}"
}

setup() {
  must_be_ready
  must_be_idle
  pack
  say "copying to ${#nodes[@]} slices, and setting up (a few minutes)…"
  on_workers "rm -rf offsetjax/source && mkdir -p offsetjax/source && tar -xzf offsetjax.tar.gz -C offsetjax/source &&\
 $worker_sh setup${prepare:+ $(quoted "$prepare")}" "$archive"
  if answers_with '^[^ ]+ failed ' >&2; then give_up "setting up failed on these workers"; fi
  all_answered || { report_silence; give_up "setting up failed on the other workers"; }
  if (($(cut -d ' ' -f 2- "$scratch/answers" | sort -u | wc -l) > 1)); then
    cat "$scratch/answers" >&2
    give_up "the workers differ: \`setup\` again, or \`delete --yes\` and \`create\`"
  fi
  say "$answered workers are $(head -n 1 "$scratch/answers" | cut -d ' ' -f 2-)"
}

digest() { quoted "${arguments[@]}" | cksum | cut -d ' ' -f 1; }

train() {
  local id
  must_be_ready
  must_be_idle
  if answers_with ' absent$' >&2; then mistake "these workers are not set up: \`setup\` does it"; fi
  id=$(date -u +%Y%m%d-%H%M%S)-$$-$(digest)
  on_workers "$worker_sh start $id $(quoted "${arguments[@]}")"
  # A slice of which some workers train waits for the others for ever.
  if ! all_answered || grep -Evq " (running|ended) $id\b" "$scratch/answers"; then
    cat "$scratch/answers" >&2
    report_silence
    on_workers "$worker_sh stop $id now"
    give_up "the training did not start on every worker, and was ended on the others"
  fi
  say "run $id has started on $answered workers; see \`status\` and \`logs --follow\`"
  printf '%s\n' "$id"
}

status() {
  local i who what id code rest
  describe || refused "$reason"
  printf '%s: %s%s\n' "$name" "$state" "${reason:+ ($reason)}"
  [[ $state == ACTIVE ]] || return 0
  find_nodes || refused "$(complaint)"
  for i in "${!nodes[@]}"; do printf '%s: %s, %s workers\n' "${nodes[i]}" "${states[i]}" "${workers[i]}"; done
  ask_status
  while read -r who what id code rest; do
    case $what in
      ended) printf '%s: run %s ended with exit status %s: %s\n' "$who" "$id" "$code" "$(meaning "$code")" ;;
      lost) printf '%s: run %s ended without an exit status: the machine went down\n' "$who" "$id" ;;
      running) printf '%s: run %s is running%s\n' "$who" "$id" "${code:+, and was asked to stop}" ;;
      absent) printf '%s: not set up\n' "$who" ;;
      *) printf '%s: %s\n' "$who" "$what${rest:+ $rest}" ;;
    esac
  done <"$scratch/answers"
  all_answered || { report_silence; give_up "not every worker can be reached: see launch/README.md, on SSH"; }
}

meaning() { # exit status of `offsetjax train`
  case $1 in
    0) printf 'done' ;;
    2) printf "a mistake in the settings, see \`logs\`" ;;
    70) printf "a fault of offsetjax, see \`logs\`" ;;
    74) printf "its storage needs a person, see \`logs\`" ;;
    75) printf 'what may pass by itself, or a stall' ;;
    134) printf 'another process of it was lost' ;;
    137) printf 'killed' ;;
    143) printf 'saved after a signal' ;;
    *) printf "it crashed, see \`logs\`" ;;
  esac
}

logs() {
  find_nodes || refused "$(complaint)"
  ((slice < ${#nodes[@]})) || mistake "$name has ${#nodes[@]} slices: there is no --slice=$slice"
  on_node "$slice" "$worker" "$worker_sh log$([[ $follow == no ]] || printf ' follow')"
}

stop() {
  local id ids began=$SECONDS
  find_nodes || refused "$(complaint)"
  ask_status
  ids=$(awk '$2 == "running" {print $3}' "$scratch/answers" | sort -u)
  if [[ $dry_run == yes ]]; then ids=last; fi
  for id in $ids; do on_workers "$worker_sh stop $id$([[ $now == no ]] || printf ' now')"; done
  while answers_with '^[^ ]+ running ' >"$scratch/running"; do
    ((SECONDS - began < stop_minutes * 60)) ||
      give_up "still running after $stop_minutes min: $(head -n 1 "$scratch/running"); \`stop --now\` kills it unsaved"
    sleep "$poll"
    ask_status
  done
  if [[ -z $ids ]]; then say "nothing is training"; else cat "$scratch/answers" >&2; fi
  all_answered || { report_silence; give_up "not every worker can be reached: see launch/README.md, on SSH"; }
}

delete() {
  local began=$SECONDS
  [[ $yes == yes ]] || mistake "delete gives $name back with all that is on its disks: add --yes"
  describe || refused "$reason"
  if [[ $state == ABSENT ]]; then
    say "there is no $name"
    return
  fi
  # --force: with its nodes; a SUSPENDED one is not deleted without it either.
  run "${qr[@]}" delete "$name" "${where[@]}" --force --quiet 2>"$scratch/err" || refused "$(complaint)"
  until [[ $dry_run == yes ]] || { describe && [[ $state == ABSENT ]]; }; do
    ((SECONDS - began < 1800)) || give_up "$name is still $state"
    sleep "$poll"
  done
  say "$name is deleted"
}

main() {
  local verb=${1-}
  case $verb in
    create | setup | train | status | logs | stop | delete | supervise) ;;
    *) mistake "a command is expected: create, setup, train, status, logs, stop, delete or supervise" ;;
  esac
  shift
  given=("$@")
  read_settings "$@"
  check_settings
  case $verb in create | supervise) check_type ;; esac
  case $verb in
    train) check_arguments ;;
    supervise)
      check_arguments
      check_config
      # shellcheck source=launch/supervise.sh
      source "$root/launch/supervise.sh"
      ;;
    *) ((${#arguments[@]} == 0)) || mistake "$verb takes nothing after --" ;;
  esac
  if [[ $dry_run == yes ]]; then exec >/dev/null; fi # what is printed then is meant to be pasted
  "$verb"
}

main "$@"
