#!/usr/bin/env bash
# Runs the trainings of a sweep, which is a config file with a grid: one after another here, or each on its own slice.
#
#   launch/sweep.sh --config=configs/sweeps/sd15_strength.py --workdir=DIR [--config.path=value…]
#   launch/sweep.sh … --slices --name=NAME [--env=FILE] [flags of tpu_vm.sh…]     a slice each, called NAME-POINT
#
#   --list         prints the state and the name of each training, and runs none
#   --dry_run      prints the commands that would be run, quoted so that they can be pasted
#   --at_once=N    of --slices: no more than N at the same time; all by default
#   --delete       of --slices: gives a slice back when its training is done, now or before, with its disks
#
# A training that is done is skipped, one that was interrupted is resumed. If one fails, that is reported, and the others are run.
# SIGTERM, Ctrl-C and a lost terminal go to the training as SIGTERM, for it to save and to end; on slices it continues.
# Exit status: 0; 1 if a training failed; 2 for what only the user can mend, at once; 74 for storage that needs a person, at
# once; 143, 130 or 129 when it was ended.
set -euo pipefail

root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
list=no dry_run=no slices=no delete=no
name="" at_once=""
points=() # arguments of `offsetjax sweep`
flags=()  # of tpu_vm.sh

# shellcheck source=launch/settings.sh
source "$root/launch/settings.sh"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

read_flags() {
  local flag
  for flag in "$@"; do
    case $flag in
      --config=* | --config.*=* | --workdir=*) points+=("$flag") ;;
      --list | --dry_run | --slices | --delete) printf -v "${flag#--}" yes ;;
      --name=*) name=${flag#--name=} ;;
      --at_once=*) at_once=${flag#--at_once=} ;;
      --?*=*) flags+=("$flag") ;;
      *) mistake "unknown argument $(quoted "$flag"); see the head of launch/sweep.sh" ;;
    esac
  done
  if [[ $slices == yes ]]; then
    [[ -n $name ]] || mistake "--name is missing, such as --name=my-sweep"
    [[ -z $at_once ]] || must_match at_once '[1-9][0-9]{0,3}' 4
  elif [[ $delete == yes || -n $name$at_once$(quoted ${flags[@]+"${flags[@]}"}) ]]; then
    mistake "--name, --at_once, --delete and the flags of tpu_vm.sh are for slices: add --slices, or leave them out"
  fi
}

# Sets states, names, trainings (arguments, with tabs between) and slice_names, and how many are left; those done are
# kept to be listed or, as an earlier sweep may have ended before it came to that, for their slices to be deleted.
read_points() {
  local listing point state rest twice skipped=0
  listing=$("$root/launch/local.sh" sweep ${points[@]+"${points[@]}"})
  if [[ $list == no ]]; then listing=$(done_first "$listing"); fi
  states=() names=() trainings=() slice_names=() left=0
  while IFS=$'\t' read -r state point rest; do
    if [[ $list == no && $state == "done" ]]; then
      skipped=$((skipped + 1))
      [[ $delete == yes ]] || continue
    else
      left=$((left + 1))
    fi
    states+=("$state") names+=("$point") trainings+=("${rest#train$'\t'}") slice_names+=("$(slice_name "$point")")
  done <<<"$listing"
  if [[ $list == no ]]; then say "$skipped trainings are done, $left are left"; fi
  twice=$(printf '%s\n' ${slice_names[@]+"${slice_names[@]}"} | sort | uniq -d)
  [[ $slices == no || -z $twice ]] || mistake "two slices would be called ${twice%%$'\n'*}: run these points apart"
}

# A slice that is done with is billed: it must not wait until others have trained.
done_first() { # listing
  awk -F '\t' '$1 == "done"' <<<"$1"
  awk -F '\t' '$1 != "done"' <<<"$1"
}

# A point as a name of Google Cloud: small letters, digits and dashes, no more than 50.
slice_name() { # point
  local text
  text=$name-$(tr '[:upper:]' '[:lower:]' <<<"$1" | tr -cs 'a-z0-9\n' -)
  ((${#text} <= 50)) || text=${text:0:39}-$(cksum <<<"$1" | cut -d ' ' -f 1)
  printf '%s' "${text%-}"
}

print_list() {
  local i
  for i in "${!names[@]}"; do
    printf '%-18s %s%s\n' "${states[i]}" "${names[i]}" "$([[ $slices == no ]] || printf '   %s' "${slice_names[i]}")"
  done
}

children=() # processes, or groups of them as -N, to which signals are passed on
ended=""    # the exit status of one that was ended by a signal

pass_on() { # exit status
  local child
  ended=$1
  for child in ${children[@]+"${children[@]}"}; do kill -TERM -- "$child" 2>/dev/null || true; done
}

heed_signals() {
  trap 'pass_on 143' TERM
  trap 'pass_on 130' INT
  trap 'pass_on 129' HUP
  trap 'pass_on 143' QUIT
}

# A signal ends `wait`, and not what it waits for.
await() { # process
  local status=0
  while :; do
    status=0
    wait "$1" || status=$?
    if ! kill -0 "$1" 2>/dev/null; then return "$status"; fi
  done
}

run_child() { # command arguments...
  if [[ $dry_run == yes ]]; then
    run "$@"
    return
  fi
  set -m # a group of its own, so that Ctrl-C comes here alone
  "$@" </dev/null &
  set +m
  children=("$!")
  # A training ends its own helpers; `supervise` leaves the gcloud that it waits for.
  if [[ $slices == yes ]]; then children=("-$!"); fi
  if [[ -n $ended ]]; then pass_on "$ended"; fi # it came just before
  await "$!"
}

train() { # index
  local arguments
  IFS=$'\t' read -ra arguments <<<"${trainings[$1]}"
  if [[ $slices == no ]]; then
    run_child "$root/launch/local.sh" train "${arguments[@]}"
  else
    tpu_vm "$1" supervise -- "${arguments[@]}"
  fi
}

tpu_vm() { # index command arguments...
  local command=("$root/launch/tpu_vm.sh" "$2" ${flags[@]+"${flags[@]}"} "--name=${slice_names[$1]}" "${@:3}")
  if [[ $dry_run == yes ]]; then
    run_child "${command[@]}"
  else
    run_child "${command[@]}" 2> >(prefixed "${slice_names[$1]}" >&2)
  fi
}

# A slice on which nothing runs: one of a training that was done before may be another's by now.
give_back() { # index
  local found
  if [[ ${states[$1]} == "done" && $dry_run == no ]]; then
    found=$("$root/launch/tpu_vm.sh" status ${flags[@]+"${flags[@]}"} "--name=${slice_names[$1]}" \
      2> >(prefixed "${slice_names[$1]}" >&2)) || return
    if [[ $found == *" is running"* ]]; then
      error "${slice_names[$1]} is busy with another run: \`stop\` that, or leave --delete out"
      return 1
    fi
  fi
  tpu_vm "$1" delete --yes
}

# Runs every `stride`-th training from the `first` on.
lane() { # first stride
  local i status kept worst=0
  for ((i = $1; i < ${#names[@]}; i += $2)); do
    if [[ -e $scratch/mistake ]]; then return 2; fi
    if [[ -e $scratch/storage ]]; then return 74; fi
    if [[ -n $ended ]]; then return "$ended"; fi
    status=0 kept=""
    if [[ ${states[i]} != "done" ]]; then
      say "${names[i]}: training $((left - ${#names[@]} + i + 1)) of $left"
      train "$i" || status=$?
    fi
    if [[ $delete == yes && -z $ended ]] && ((status == 0)); then
      give_back "$i" || status=$? kept="done, but its slice ${slice_names[i]} is not deleted, and billed: "
    fi
    status=${ended:-$status}
    case $status in
      0) say "${names[i]}: done" ;;
      2)
        error "${names[i]}: ${kept}a mistake, see above; no more trainings are begun"
        touch "$scratch/mistake"
        return 2
        ;;
      74)
        error "${names[i]}: ${kept}its storage needs a person, see above; no more trainings are begun"
        touch "$scratch/storage"
        return 74
        ;;
      129 | 130 | 143)
        say "${names[i]}: ended; the same command resumes"
        return "$status"
        ;;
      *)
        error "${names[i]}: ${kept}failed with exit status $status; the others continue; the same command tries it again"
        worst=1
        ;;
    esac
  done
  return "$worst"
}

prefixed() { # slice
  local line
  while IFS= read -r line; do printf '%s: %s\n' "$1" "$line"; done
}

# One lane a slice, or --at_once of them.
lanes() {
  local i count=${#names[@]} status worst=0 pids=()
  if [[ -n $at_once ]] && ((at_once < count)); then count=$at_once; fi
  for ((i = 0; i < count; i++)); do
    # A subshell has no traps of its own, and the others' processes are not its children.
    { children=() && heed_signals && lane "$i" "$count"; } &
    pids+=("$!")
  done
  children=("${pids[@]}")
  if [[ -n $ended ]]; then pass_on "$ended"; fi
  for i in "${!pids[@]}"; do
    status=0
    await "${pids[i]}" || status=$?
    if ((status > worst)); then worst=$status; fi
  done
  if [[ -e $scratch/storage ]]; then worst=74; fi
  if [[ -e $scratch/mistake ]]; then worst=2; fi
  if [[ -n $ended ]]; then say "the trainings on slices continue; the same command follows them again"; fi
  return "${ended:-$worst}"
}

main() {
  local status=0
  read_flags "$@"
  read_points
  if [[ $list == yes ]]; then
    print_list
    return
  fi
  heed_signals
  if [[ $slices == yes && $dry_run == no ]]; then lanes || status=$?; else lane 0 1 || status=$?; fi
  exit "$status"
}

main "$@"
