# shellcheck shell=bash disable=SC2154 # the variables are tpu_vm.sh's
# Sourced by tpu_vm.sh: `supervise` creates the slices, sets them up, trains, follows the run, and does so again after a failure.
#
# A preempted slice cannot be restarted, only created again; the run resumes from its work directory on gs://. What only a
# person can mend (exit status 2 of any step or of the training, 74 of the training) ends it at once.

id=""    # of the run that is watched
how=""   # it went: done, stopped, mistake, storage, again or unreachable
why=""   # in words
began="" # when the watching did; the wait for slices, which may take hours, is no sign of a good run

step() { # command flags...
  local words=("$BASH" "$root/launch/tpu_vm.sh" "$1" "${flags[@]}" "${@:2}")
  if [[ $dry_run == yes ]]; then "${words[@]}" >&3; else "${words[@]}"; fi
}

supervise() {
  local failures=0 wait_seconds
  trap 'say "the training continues; the same command follows it again, \`stop\` ends it"; exit 130' INT
  split_flags "${given[@]}"
  # One copy for all attempts: what is changed here meanwhile must not get into a run that is alive.
  pack
  export OFFSETJAX_ARCHIVE=$archive
  adopt
  while :; do
    attempt
    case $how in
      done)
        say "run $id is done"
        return
        ;;
      stopped)
        say "run $id was stopped; the same command resumes it"
        exit 143
        ;;
      mistake) mistake "$why" ;;
      storage)
        error "$why"
        exit 74
        ;;
      unreachable) give_up "$why" ;;
    esac
    id=""
    if [[ -n $began ]] && ((SECONDS - began >= steady)); then failures=0; fi
    ((++failures <= max_restarts)) || give_up "$why; that was failure $failures in a row (--max_restarts=$max_restarts)"
    wait_seconds=$((pause * (1 << (failures < 6 ? failures - 1 : 5))))
    say "$why; trying again in $wait_seconds s (failure $failures of at most $max_restarts in a row)"
    sleep "$wait_seconds"
  done
}

split_flags() { # the flags, and what follows `--`
  flags=()
  while (($#)) && [[ $1 != -- ]]; do
    flags+=("$1")
    shift
  done
}

# A run of the same arguments that is alive already, from an earlier `supervise` or `train`.
adopt() {
  local ids
  if [[ $dry_run == yes ]] || ! describe || [[ $state != ACTIVE ]] || ! find_nodes; then return; fi
  ask_status
  ids=$(awk '$2 == "running" {print $3}' "$scratch/answers" | sort -u)
  if [[ -z $ids ]]; then return; fi
  [[ $ids == *-"$(digest)" && $ids != *$'\n'* ]] ||
    mistake "$name is busy with another run, $(xargs <<<"$ids"): \`stop\` it first"
  id=$ids
  say "following run $id, which is running already"
}

# One attempt, from whatever is there to the end of the run; sets how, why and began.
attempt() {
  local status=0
  how="" why="" began=""
  if [[ -z $id ]]; then
    start_over || status=$?
    case $status in
      0) ;;
      2) how=mistake why="not started again, see above" ;;
      *) how=again why="the training did not start" ;;
    esac
  fi
  if [[ -z $how ]]; then
    began=$SECONDS
    watch
  fi
}

# In a condition `set -e` is off: each step has to say what follows from its failure.
start_over() {
  clear_away && step create && step setup || return
  id=$(step train -- "${arguments[@]}")
}

# Removes what cannot train any more, and only that.
clear_away() {
  while describe && [[ $state == SUSPENDING || $state == DELETING ]]; do sleep "$poll"; done
  if [[ -n $reason && $state != SUSPENDED ]]; then # a failure of the slices, or of gcloud itself
    error "$name: $reason"
    if is_final "$reason"; then return 2; fi
    [[ $state == FAILED ]] || return 1
  fi
  if [[ $state == FAILED || $state == SUSPENDED ]] || { [[ $state == ACTIVE ]] && has_dead_nodes; }; then
    step delete --yes
  fi
}

has_dead_nodes() { find_nodes && [[ " ${states[*]-} " =~ \ (PREEMPTED|TERMINATED)\  ]]; }

watch() {
  local silent=0 lonely=""
  while [[ -z $how ]]; do
    [[ $dry_run == yes ]] || sleep "$poll"
    # While gcloud itself cannot be reached nothing is known, and the training continues without us.
    if ! describe || { [[ $state == ACTIVE ]] && ! find_nodes; }; then
      say "gcloud does not answer: $(complaint)"
    elif [[ $state != ACTIVE ]] || has_dead_nodes; then
      how=again why="the slices are gone ($name is $state${reason:+, $reason})"
    else
      ask_status
      judge
    fi
    if [[ $dry_run == yes ]]; then how="done"; fi
  done
}

# Sets how and why from the workers' answers, once they leave no doubt.
judge() {
  local running codes
  if ! all_answered; then
    # A slice under repair comes back, or is PREEMPTED in the end.
    if ! all_ready || ((++silent < 10)); then return; fi
    report_silence
    how=unreachable why="workers do not answer, but $name is ACTIVE; the training may still run: see launch/README.md, on SSH"
    return
  fi
  silent=0
  running=$(grep -c " running $id\b" "$scratch/answers" || true)
  codes=$(awk '$2 != "running" {print $2 == "ended" ? $4 : $2}' "$scratch/answers" | sort -u | xargs)
  if [[ " $codes " == *" 2 "* ]]; then
    how=mistake why="the training ended with exit status 2: a mistake in the settings, see \`logs\`"
  elif [[ " $codes " == *" 74 "* ]]; then
    how=storage why="the training ended with exit status 74: its storage needs a person, see \`logs\`"
  elif ((running == answered)); then
    lonely=""
  elif ((running == 0)) && [[ $codes == 0 ]]; then
    how="done"
  elif ((running == 0)) && answers_with ' stopped$' >/dev/null; then
    how=stopped
  elif ((running == 0)); then
    how=again why="the training ended with exit status ${codes// /, }"
  else
    # Those that lost a peer notice, by its heartbeat, and end; if not, they are ended.
    lonely=${lonely:-$SECONDS}
    ((SECONDS - lonely < grace)) ||
      { how=again why="the training ended on some workers only, with exit status ${codes// /, }"; }
  fi
  if [[ -n $how ]] && ((running > 0)); then on_workers "$worker_sh stop $id now"; fi
}
