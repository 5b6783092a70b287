# shellcheck shell=bash
# Sourced by tpu_vm.sh and gke.sh: settings from flags and an env file; commands that are run, or printed to be pasted.
#
# `settings` names what --key=value and KEY=VALUE may set, `switches` the flags without a value. Each is a variable of
# that name, which the script has given its default. What follows `--` is the array `arguments`.

arguments=()
exec 3>&1 # the script's own standard output, even where a command's is captured

# shellcheck disable=SC2154 # a switch of every script that sources this
say() { [[ $dry_run == yes ]] || printf '%s: %s\n' "${0##*/}" "$*" >&2; }

error() { printf '%s: error: %s\n' "${0##*/}" "$*" >&2; }

mistake() { # what is wrong, and the remedy
  error "$@"
  exit 2
}

give_up() { # what failed, and the remedy: trying again may help
  error "$@"
  exit 1
}

# Words as any shell reads them; printf's %q is harder to read.
quoted() {
  local word text=""
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word="'${word//\'/"'\''"}'"
    text+=" $word"
  done
  printf '%s' "${text# }"
}

run() { if [[ $dry_run == yes ]]; then printf '%s\n' "$(quoted "$@")" >&3; else "$@"; fi; }

set_value() { # origin key value
  # shellcheck disable=SC2154
  [[ " $settings " == *" $2 "* && $2 != *" "* ]] ||
    mistake "$1: there is no setting $(quoted "$2"); there are: $settings"
  [[ $3 != *[[:cntrl:]]* ]] || mistake "a control character in the value of $2"
  printf -v "$2" '%s' "$3"
}

# The lines are read, never run: a value is all that follows the first equals sign, quotes and dollar signs included.
read_env() { # file
  local line number=0
  [[ -f $1 ]] || mistake "no such file: $1"
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    line=${line%$'\r'}
    case $line in
      "" | "#"*) ;;
      [A-Z]*=*) set_value "$1:$number" "$(tr '[:upper:]' '[:lower:]' <<<"${line%%=*}")" "${line#*=}" ;;
      *) mistake "$1:$number: KEY=VALUE is expected, such as NODE_COUNT=2" ;;
    esac
  done <"$1"
}

read_settings() { # flags, and what follows `--`
  local flag
  # The env file first, so that flags have the last word wherever they stand.
  for flag in "$@"; do
    case $flag in
      --) break ;;
      --env=*) read_env "${flag#--env=}" ;;
    esac
  done
  while (($#)); do
    flag=${1#--}
    case $1 in
      --)
        arguments=("${@:2}")
        return
        ;;
      --env=*) ;;
      --*=*) set_value "$1" "${flag%%=*}" "${flag#*=}" ;;
      --?*)
        # shellcheck disable=SC2154
        [[ " $switches " == *" $flag "* && $flag != *" "* ]] ||
          mistake "unknown flag $(quoted "$1"); settings are --key=value"
        printf -v "$flag" yes
        ;;
      *) mistake "unknown argument $(quoted "$1"); what is for the training follows --" ;;
    esac
    shift
  done
}

# Patterns keep a setting's text harmless wherever it ends up: in a command, in a shell far away, in YAML.
must_match() { # setting pattern example
  [[ -n ${!1} ]] || mistake "--$1 is missing, such as --$1=$3"
  [[ ${!1} =~ ^($2)$ ]] || mistake "--$1=$(quoted "${!1}"): expected something like $3"
}

# What is run on every worker, after checks that need no TPU: `train`, where the arguments begin with no command.
check_arguments() {
  local argument flag=workdir folder="" command=""
  case "$(quoted ${arguments[@]+"${arguments[@]:0:2}"}) " in
    " " | --* | "'--"*) ;;
    "train "*) command="train " ;;
    "calibrate "*) command="calibrate " flag=out ;;
    "data encode ") command="data encode " flag=out ;;
    *)
      mistake "$(quoted "${arguments[0]//[[:cntrl:]]/?}"): of the commands \`train\`, \`calibrate\` and \`data encode\`" \
        "alone run on several workers"
      ;;
  esac
  for argument in ${arguments[@]+"${arguments[@]}"}; do
    [[ $argument != *[[:cntrl:]]* ]] || mistake "a control character in the argument ${argument//[[:cntrl:]]/?}"
    [[ $argument != --$flag=* ]] || folder=${argument#*=}
  done
  [[ -n $folder ]] ||
    mistake "the arguments follow --, such as: -- $command--config=configs/sd15_offset.py --$flag=gs://…"
  # The workers share no disk, and theirs go with the slice.
  [[ $folder == gs://* ]] || mistake "--$flag=$(quoted "$folder"): a place on gs://… is needed"
}

# What would be found out on slices that are paid for: that there is no such config, or that it is refused.
# shellcheck disable=SC2154 # root is the script's that sources this
check_config() {
  local argument config="" changes=() why
  [[ -d $root/offsetjax ]] || return 0
  for argument in ${arguments[@]+"${arguments[@]}"}; do
    case $argument in
      --config=*) config=${argument#*=} ;;
      --config.*) changes+=("$argument") ;;
    esac
  done
  [[ -n $config ]] || mistake "--config is missing, such as --config=configs/sd15_offset.py"
  # An absolute path may be made by PREPARE; all else comes with this checkout.
  [[ $config == /* || -f $root/$config ]] || mistake "--config=$(quoted "$config"): there is no such file in $root"
  [[ $config != /* && -x $root/.venv/bin/python ]] || return 0
  why=$(cd "$root" && JAX_PLATFORMS=cpu .venv/bin/python -m offsetjax config --config="$config" \
    ${changes[@]+"${changes[@]}"} 2>&1 >/dev/null) || mistake "${why##*offsetjax: error: }"
}
