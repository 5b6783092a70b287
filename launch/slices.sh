# shellcheck shell=bash disable=SC2154 # the variables are tpu_vm.sh's
# Sourced by tpu_vm.sh: what gcloud says of the slices, and commands that run on all of their workers at once.

# What the last command that failed had to say, in one line.
complaint() {
  local line
  line=$(grep -m 1 ERROR "$scratch/err" || grep . "$scratch/err" | tail -n 1) || line="no reason given"
  printf '%s' "$line"
}

# The reasons for which asking again does not help.
is_final() {
  local pattern="[Qq]uota|PERMISSION_DENIED|INVALID_ARGUMENT|NOT_FOUND|[Rr]eauthentication"
  [[ $1 =~ $pattern|unrecognized\ arguments|argument\ - ]]
}

refused() { # reason
  local remedy="correct the settings"
  is_final "$1" || give_up "$1"
  case $1 in
    *[Qq]uota*) remedy="ask for quota (IAM & Admin, Quotas), or try another zone, tier or accelerator_type" ;;
    *PERMISSION_DENIED* | *eauthentication*) remedy="see \`gcloud auth list\`; the role TPU Admin is needed" ;;
  esac
  mistake "$1: $remedy"
}

# Sets state, to ABSENT where there is none, and reason.
describe() {
  local line initiator="" fields=state.state,state.stateInitiator,state.failedData.error.message
  state=${assumed-ACTIVE} reason=""
  if line=$(run "${qr[@]}" describe "$name" "${where[@]}" "--format=value[separator=\"|\"]($fields)" 2>"$scratch/err"); then
    [[ -z $line ]] || IFS='|' read -r state initiator reason <<<"$line"
    if [[ $state == SUSPEND* && $initiator == SERVICE ]]; then reason="preempted${reason:+: $reason}"; fi
  elif grep -q NOT_FOUND "$scratch/err"; then
    state=ABSENT
  else
    state=UNKNOWN reason=$(complaint)
    return 1
  fi
}

# Sets nodes, states and workers: the name, the state and the number of workers of each slice.
find_nodes() {
  local node node_state count fields="name.basename(),state,networkEndpoints.len()"
  nodes=() states=() workers=()
  run gcloud compute tpus tpu-vm list "${where[@]}" --filter="queuedResource~\"/queuedResources/$name\$\"" \
    --format="csv[no-heading]($fields)" >"$scratch/nodes" 2>"$scratch/err" || return
  if [[ $dry_run == yes ]]; then assumed_nodes >"$scratch/nodes"; fi
  while IFS=, read -r node node_state count; do
    nodes+=("$node") states+=("$node_state") workers+=("$count")
  done < <(sort -V "$scratch/nodes")
}

assumed_nodes() {
  local i
  if ((node_count == 1)); then printf '%s,READY,1\n' "$name"; fi
  for ((i = 0; node_count > 1 && i < node_count; i++)); do printf '%s-%d,READY,1\n' "$name" "$i"; done
}

must_be_ready() {
  local i
  describe || refused "$reason"
  [[ $state == ACTIVE ]] || give_up "$name is $state${reason:+ ($reason)}, not ACTIVE: $(remedy_of "$state")"
  find_nodes || refused "$(complaint)"
  ((${#nodes[@]} <= node_count)) || mistake "$name has ${#nodes[@]} slices, and --node_count=$node_count"
  ((${#nodes[@]} == node_count)) || give_up "$name has ${#nodes[@]} slices, and --node_count=$node_count"
  for i in "${!nodes[@]}"; do
    [[ ${states[i]} == READY ]] || give_up "slice ${nodes[i]} is ${states[i]}, not READY: under repair, or gone"
  done
}

remedy_of() { # state
  case $1 in
    FAILED | SUSPEND*) printf '%s' "a slice cannot be restarted; \`delete --yes\` and \`create\` make a new one" ;;
    *) printf '%s' "\`create\` asks for it, or waits for it" ;;
  esac
}

on_node() { # index workers command [file]: copies the file there first
  local flags=("${where[@]}" ${route[@]+"${route[@]}"} "--worker=$2")
  # gcloud tries ten times; without these a machine that is gone takes two minutes each time, and one that goes hangs.
  local patience=-oConnectTimeout=20
  if [[ -n ${4-} ]]; then
    run "${vm[@]}" scp "$4" "${nodes[$1]}:offsetjax.tar.gz" "${flags[@]}" "--scp-flag=$patience" || return
  fi
  run "${vm[@]}" ssh "${nodes[$1]}" "${flags[@]}" "--ssh-flag=$patience -oServerAliveInterval=15" "--command=$3"
}

# Runs a command on every worker at once. $scratch/answers gets a line "SLICE/WORKER answer" for each that answered.
on_workers() { # command [file]
  local i first last which calls=0
  rm -f "$scratch"/*.out "$scratch"/*.err
  : >"$scratch/answers"
  asked=0 answered=0
  for i in "${!nodes[@]}"; do
    ((asked += workers[i])) || true
    for ((first = 0; first < workers[i]; first += batch)); do
      last=$((first + batch < workers[i] ? first + batch - 1 : workers[i] - 1)) which=all
      if ((workers[i] > batch)); then which=$first; ((last == first)) || which+=-$last; fi
      if [[ $dry_run == yes ]]; then
        on_node "$i" "$which" "$@"
        continue
      fi
      on_node "$i" "$which" "$@" </dev/null >"$scratch/$i.$first.out" 2>"$scratch/$i.$first.err" &
      ((++calls % 16)) || wait
    done
  done
  wait
  if [[ $dry_run != yes ]]; then collect_answers; fi
}

collect_answers() {
  local i
  for i in "${!nodes[@]}"; do
    # One answer a worker: that of the last try, where gcloud tried again.
    { cat "$scratch/$i".*.out 2>/dev/null || true; } | tr -d '\r' | awk -v node="${nodes[i]}" \
      '$1 == "offsetjax" {$1 = ""; answers[$2] = node "/" substr($0, 2)} END {for (w in answers) print answers[w]}'
  done | sort -V >"$scratch/answers"
  answered=$(wc -l <"$scratch/answers")
}

all_answered() { [[ $dry_run == yes ]] || ((answered == asked)); }

all_ready() { [[ " ${states[*]-}" =~ ^(\ READY)*$ ]]; }

report_silence() {
  if all_answered; then return; fi
  tail -qn 3 "$scratch"/*.err >&2
  say "$answered of $asked workers answered: $(cut -d ' ' -f 1 "$scratch/answers" | xargs)"
}

answers_with() { grep -E "$1" "$scratch/answers"; }

# Before the set-up there is nobody to ask.
ask_status() { on_workers "[ ! -x $worker_sh ] && echo \"offsetjax \${HOSTNAME##*-w-} absent\" || $worker_sh status"; }

must_be_idle() {
  ask_status
  all_answered || { report_silence; give_up "not every worker can be reached: see launch/README.md, on SSH"; }
  ! answers_with '^[^ ]+ running ' >"$scratch/running" ||
    mistake "$name is busy: $(head -n 1 "$scratch/running"); see \`logs\`, or \`stop\` it"
}
