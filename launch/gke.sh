#!/usr/bin/env bash
# Trains on TPUs of a GKE cluster, one slice or several, in an image of launch/Dockerfile. The manual: launch/README.md.
#
#   launch/gke.sh manifest --env=FILE -- ARGUMENTS… | kubectl apply -f -    jobset.yaml for `offsetjax train ARGUMENTS…`
#   launch/gke.sh xpk      --env=FILE -- ARGUMENTS…                         the same through `xpk workload create`
#
# The arguments may also be those of another command that works on several workers: -- data encode ARGUMENTS…
#
# The settings below are flags, --node_count=2, or lines of FILE, NODE_COUNT=2. --dry_run prints xpk's command, runs none.
# shellcheck disable=SC2034 # some settings are read by their names
set -euo pipefail

root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
placeholders="name image node_count max_restarts grace_seconds"
placeholders+=" accelerator topology chips_per_host namespace service_account"
settings="$placeholders cluster project zone tpu_type"
switches="dry_run"

name="" image=""
node_count=1      # slices
max_restarts=20   # of all slices together
grace_seconds=600 # from SIGTERM to SIGKILL: for the last checkpoint
# For the manifest: labels of the node pool, chips of each of its machines; of the pods.
accelerator="" topology="" chips_per_host=4 namespace=default service_account=default
# For xpk.
cluster="" project="" zone="" tpu_type=""
dry_run=no

# shellcheck source=launch/settings.sh
source "$root/launch/settings.sh"

check_settings() {
  must_match name '[a-z]([a-z0-9-]{0,38}[a-z0-9])?' my-run # JobSet adds to it, and 63 characters are the limit
  must_match image '[A-Za-z0-9][A-Za-z0-9._:/@-]*' us-docker.pkg.dev/my-project/my-repository/offsetjax:1
  must_match node_count '[1-9][0-9]{0,3}' 2
  must_match max_restarts '0|[1-9][0-9]{0,5}' 20
  must_match grace_seconds '[1-9][0-9]{0,5}' 600
  check_arguments
  if [[ ${arguments[0]} == --* ]]; then arguments=(train "${arguments[@]}"); fi
}

# A list that JSON and YAML read alike. Kubernetes would put a variable's value in the place of $(NAME), and reads $$ as $.
json() {
  local text separator="" backslash="\\"
  printf '['
  for text in "$@"; do
    text=${text//"$backslash"/"$backslash$backslash"}
    text=${text//\"/"$backslash\""}
    text=${text//"\$"/"\$\$"}
    printf '%s"%s"' "$separator" "$text"
    separator=", "
  done
  printf ']'
}

manifest() {
  local text chips hosts setting
  must_match accelerator 'tpu-?[a-z0-9]+(-[a-z0-9]+)*|tpu7x' tpu-v5-lite-podslice
  must_match topology '[1-9][0-9]*x[1-9][0-9]*(x[1-9][0-9]*)?' 4x4
  must_match chips_per_host '1|4|8' 4
  must_match namespace '[a-z0-9]([a-z0-9-]*[a-z0-9])?' default
  must_match service_account '[a-z0-9]([a-z0-9.-]*[a-z0-9])?' default
  chips=$((${topology//x/ * }))
  hosts=$((chips / chips_per_host))
  ((hosts * chips_per_host == chips)) ||
    mistake "--topology=$topology has $chips chips, and not a multiple of --chips_per_host=$chips_per_host"
  text=$(<"$root/launch/jobset.yaml")
  for setting in $placeholders; do
    fill "$(tr '[:lower:]' '[:upper:]' <<<"$setting")" "${!setting}"
  done
  fill HOSTS "$hosts"
  fill ARGUMENTS "$(json "${arguments[@]}")"
  printf '%s\n' "$text"
}

fill() { # PLACEHOLDER value
  text=${text//"\${$1}"/"$2"}
}

workload() {
  must_match cluster '[a-z]([a-z0-9-]*[a-z0-9])?' my-cluster
  must_match zone '[a-z0-9]+(-[a-z0-9]+)+' us-west4-a
  must_match tpu_type '[a-z0-9]+-[0-9a-z]+(-[0-9a-z]+)?' v5litepod-16
  [[ -z $project ]] || must_match project '[a-z0-9.:-]+' my-project
  [[ $dry_run == yes ]] || command -v xpk >/dev/null || mistake "no xpk: pip install xpk"
  # xpk restarts after 42 and 127 to 255 of itself: with these, after all but 0, 2 and 74. It passes SIGTERM on to the shell
  # that runs the command, whose place offsetjax therefore takes.
  run xpk workload create --cluster="$cluster" --zone="$zone" ${project:+--project="$project"} --workload="$name" \
    --tpu-type="$tpu_type" --num-slices="$node_count" --docker-image="$image" --max-restarts="$max_restarts" \
    --restart-on-exit-codes=1,3-73,75-126 --termination-grace-period-seconds="$grace_seconds" \
    --command="exec offsetjax $(quoted "${arguments[@]}")"
}

command=${1-}
[[ $command == manifest || $command == xpk ]] || mistake "a command is expected: manifest or xpk"
read_settings "${@:2}"
check_settings
[[ $command != xpk ]] || check_config
case $command in
  manifest) manifest ;;
  xpk) workload ;;
esac
