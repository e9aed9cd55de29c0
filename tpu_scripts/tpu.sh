#!/usr/bin/env bash
# A run on a Cloud TPU, from nothing to its results. Every command may be given again.
#
#   tpu.sh create            asks for the TPU (a queued resource) and waits until it is there
#   tpu.sh setup             copies this checkout to all workers and installs it
#   tpu.sh run CMD...        starts CMD on all workers; it goes on without this machine
#   tpu.sh watch [WORKER]    states, then the log of a worker (0) until the run ends
#   tpu.sh resume CMD...     create, setup and run, again after each preemption, until CMD is done
#   tpu.sh stop              CMD saves and ends
#   tpu.sh fetch DIR         what CMD wrote into --output_dir DIR, into DIR here
#   tpu.sh delete            gives the TPU back
#   tpu.sh ssh CMD...        CMD on all workers, in their home
#
# Settings, from the environment or from the file CONFIG (pod.env beside this script):
#   PROJECT ZONE NAME  where, and what to call it
#   ACCELERATOR        v6e-16, v5p-16, v5litepod-16, ...; or TYPE and TOPOLOGY, such as v4, 2x2x2
#   RUNTIME            software version; by default that of the generation
#   PROVISIONING       spot (default), reserved or on-demand
#   BUCKET DATA EXTRAS KEEP   see worker.sh; resume needs BUCKET and --checkpoint_dir gs://...
#   CREATE_FLAGS SSH_FLAGS    more flags of gcloud's create, and of its ssh and scp
#   POLL TRIES         of resume: seconds between two looks (30), failures it takes (4)
#   DRY_RUN=1          prints the gcloud commands instead
set -euo pipefail
shopt -s inherit_errexit

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec 3>&1 # what a dry run prints, also from inside $(...)

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }
say() { printf '%s tpu.sh: %s\n' "$(date +%T)" "$*" >&2; }
fail() {
  say "$*"
  exit 1
}

cloud() {
  if [[ -n ${DRY_RUN:-} ]]; then
    { printf 'gcloud' && printf ' %q' "$@" && echo; } >&3
  else
    gcloud "$@" </dev/null
  fi
}

queued() { cloud compute tpus queued-resources "$1" "${@:2}" "${where[@]}"; }

configure() {
  local config=${CONFIG:-$here/pod.env} needed
  [[ -z ${CONFIG:-} || -f $config ]] || fail "CONFIG: $config is not a file"
  # shellcheck source=/dev/null
  [[ ! -f $config ]] || . "$config"
  for needed in PROJECT ZONE NAME; do
    [[ -n ${!needed:-} ]] || fail "$needed is not set: expected it in the environment or in $config"
  done
  where=(--project="$PROJECT" --zone="$ZONE" --quiet)
  read -ra ssh_flags <<<"${SSH_FLAGS:-}"
  [[ ${BUCKET:-gs://} == gs://* ]] || fail "BUCKET: found $BUCKET, expected gs://..."
  BUCKET=${BUCKET:-}
  BUCKET=${BUCKET%/}
}

# --- the resource

# Its state, NONE where there is none; fails where gcloud does.
state() {
  local found
  found=$(queued list --filter="name~/$NAME\$" --format='value(state.state)')
  printf '%s\n' "${found:-NONE}"
}

runtime() {
  case ${RUNTIME:-${ACCELERATOR:-$TYPE}} in
    "${RUNTIME:-}") echo "$RUNTIME" ;;
    v6e*) echo v2-alpha-tpuv6e ;;
    v5p*) echo v2-alpha-tpuv5 ;;
    v5litepod*) echo v2-alpha-tpuv5-lite ;;
    v[234]*) echo tpu-ubuntu2204-base ;;
    *) fail "RUNTIME is not set, and ${ACCELERATOR:-$TYPE} has no default" ;;
  esac
}

ask() {
  local flags=(--node-id="$NAME") more version
  if [[ -n ${ACCELERATOR:-} ]]; then
    flags+=(--accelerator-type="$ACCELERATOR")
  else
    [[ -n ${TYPE:-} && -n ${TOPOLOGY:-} ]] || fail 'expected ACCELERATOR, or TYPE and TOPOLOGY'
    flags+=(--type="$TYPE" --topology="$TOPOLOGY")
  fi
  version=$(runtime) || exit
  case ${PROVISIONING:=spot} in
    spot | reserved) flags+=("--$PROVISIONING") ;;
    on-demand) ;;
    *) fail "PROVISIONING: found $PROVISIONING, expected spot, reserved or on-demand" ;;
  esac
  read -ra more <<<"${CREATE_FLAGS:-}"
  queued create "$NAME" "${flags[@]}" --runtime-version="$version" "${more[@]}"
}

create() {
  local now before='' asked='' why
  while :; do
    now=$(state)
    [[ $now == "$before" ]] || say "$NAME: $now"
    before=$now
    case $now in
      ACTIVE) return ;;
      NONE)
        if ! ask; then # perhaps somebody else was faster
          now=$(state)
          [[ $now != NONE ]] || fail "$NAME was not created"
        fi
        asked=1
        [[ -z ${DRY_RUN:-} ]] || return 0
        ;;
      FAILED | SUSPENDED) # there are no machines any more, and the name is taken
        if [[ $now == FAILED && -n $asked ]]; then
          why=$(queued describe "$NAME" --format='value(state.failedData.error.message)')
          fail "$NAME: $why"
        fi
        queued delete "$NAME" --force
        ;;
      *) sleep "${POLL:-30}" ;; # WAITING_FOR_RESOURCES, PROVISIONING, SUSPENDING, DELETING, ...
    esac
  done
}

delete() {
  local now
  now=$(state)
  if [[ $now == NONE && -z ${DRY_RUN:-} ]]; then
    say "$NAME is not there"
  else
    queued delete "$NAME" --force
  fi
}

# --- its workers

# on WORKERS CMD...: the words arrive as they are, through gcloud, ssh and the shell there.
on() {
  local words
  printf -v words '%q ' "${@:2}"
  cloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker="$1" "${ssh_flags[@]}" \
    --command="${words% }"
}

copy() { cloud compute tpus tpu-vm scp "$@" "${where[@]}" "${ssh_flags[@]}"; }

worker() {
  on "$1" env BUCKET="$BUCKET" DATA="${DATA:-}" EXTRAS="${EXTRAS:-}" KEEP="${KEEP:-}" \
    bash jaxrm/tpu_scripts/worker.sh "${@:2}"
}

# shellcheck disable=SC2016
UNPACK='set -e
mkdir -p jaxrm
cd jaxrm
if [ -e tpu_scripts/worker.sh ] && [ "$(bash tpu_scripts/worker.sh status)" = running ]; then
  echo "a run is on: stop it first" >&2
  exit 1
fi
find . -mindepth 1 -maxdepth 1 ! -name runs ! -name data -exec rm -rf {} +
tar xzf ../jaxrm.tgz'

setup() {
  local folder
  folder=$(mktemp -d)
  # shellcheck disable=SC2064
  trap "rm -rf '$folder'" EXIT
  bash "$here/worker.sh" pack >"$folder/jaxrm.tgz"
  copy "$folder/jaxrm.tgz" "$NAME:jaxrm.tgz" --worker=all
  on all bash -c "$UNPACK"
  worker all setup
}

run() { worker all start "$@"; }
stop() { worker all stop; }

watch() {
  local now
  now=$(state)
  echo "$NAME: $now"
  [[ $now == ACTIVE || -n ${DRY_RUN:-} ]] || return 0
  worker all status
  worker "${1:-0}" follow
}

fetch() {
  local dir=${1%/}
  if [[ -n $BUCKET ]]; then
    mkdir -p "$dir"
    cloud storage rsync --recursive "$BUCKET/$dir" "$dir"
  else
    mkdir -p "$(dirname "$dir")"
    copy --recurse "$NAME:jaxrm/$dir" "$(dirname "$dir")" --worker=0
  fi
}

# --- until it is done

# The worst of what the workers say; fails where one of them does not answer.
outcome() {
  local lines word
  lines=$(worker all status) || return
  for word in 'failed 2' 'failed.*' none running; do
    ! grep -m1 -x "$word" <<<"$lines" || return 0
  done
  echo 'done'
}

# Waits for the end of the run: done, failed N, lost, or dead (ACTIVE, without an answer).
finish() {
  local now found silent=0
  while :; do
    sleep "${POLL:-30}"
    if now=$(state) && [[ $now != ACTIVE ]]; then
      echo lost
      return
    elif found=$(outcome); then
      silent=0
      [[ $found == running ]] || break
    elif ((++silent == 5)); then
      now=$(state) # or it is gcloud that does not answer
      echo dead
      return
    fi
  done
  if [[ $found != 'done' ]]; then
    sleep "${POLL:-30}" # workers notice a preemption before the resource does
    now=$(state)
    [[ $now == ACTIVE ]] || found=lost
  fi
  echo "$found"
}

resume() {
  local found failures=0
  [[ -n $BUCKET && " $* " =~ \ --checkpoint[-_]dir[=\ ]gs:// ]] ||
    fail 'resume: expected BUCKET and --checkpoint_dir gs://...: the disks of a TPU go with it'
  while :; do
    create
    found=$(outcome) || found=none
    # In processes of their own: a TPU that goes away here is no error.
    if { [[ $found == running ]] || bash "$here/tpu.sh" setup; } && bash "$here/tpu.sh" run "$@"; then
      [[ -z ${DRY_RUN:-} ]] || return 0
      found=$(finish)
    else
      (($? != 3)) || fail "$NAME has another run: tpu.sh stop ends it"
      found=$(state)
      [[ $found == ACTIVE ]] && found='failed to start' || found=lost
    fi
    say "$NAME: $found"
    case $found in
      'done') return ;;
      'failed 2') exit 2 ;; # wrong input
      lost) failures=0 ;;
      dead)
        failures=0
        delete
        ;;
      *)
        ((++failures < ${TRIES:-4})) || fail "$NAME: failed $failures times: see tpu.sh watch"
        stop || true
        ;;
    esac
  done
}

command=${1:-}
shift || true
case $command in
  help | -h | --help)
    usage
    exit
    ;;
  run | resume | ssh) (($#)) || fail "$command: expected a command" ;;
  fetch) (($# == 1)) || fail 'fetch: expected the --output_dir of the run' ;;
  create | setup | watch | stop | delete) ;;
  *)
    usage >&2
    exit 2
    ;;
esac
configure
case $command in
  ssh) on all "$@" ;;
  *) "$command" "$@" ;;
esac
