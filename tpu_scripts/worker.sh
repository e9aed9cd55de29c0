#!/usr/bin/env bash
# One worker of a run: what tpu.sh, xpk.sh and slurm.sbatch start on every host.
#
#   worker.sh setup          Python 3.12 and jaxrm into VENV, where missing or out of date
#   worker.sh run CMD...     CMD in the checkout, with that Python; ends with its exit status
#   worker.sh job CMD...     setup, then run
#   worker.sh start CMD...   run, detached: the log is STATE/log, the end of a shell harms nothing
#   worker.sh status         none, running, done or failed N
#   worker.sh follow         prints the log until the run ends
#   worker.sh stop           the run saves and ends (SIGTERM); waits for it
#   worker.sh pack           this checkout, less what git ignores, as .tgz on stdout
#
# From the environment:
#   EXTRAS   what to install with jaxrm (tpu,gcs,plots,trackers)
#   DATA     gs://... that setup copies to data/
#   BUCKET   gs://...: the first worker's --output_dir DIR is fetched from BUCKET/DIR before CMD
#            and kept there every KEEP seconds (300) and after it, with the logs of all workers
#   VENV     (~/.jaxrm/venv)      STATE (~/.jaxrm)
set -euo pipefail
shopt -s inherit_errexit

STATE=${STATE:-$HOME/.jaxrm}
VENV=${VENV:-$STATE/venv}
EXTRAS=${EXTRAS:-tpu,gcs,plots,trackers}
METADATA=http://metadata.google.internal/computeMetadata/v1/instance/attributes
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }
say() { printf '%s worker.sh: %s\n' "$(date +%T)" "$*" >&2; }
fail() {
  say "$*"
  exit 1
}

# --- set up

python312() {
  local name uv=$STATE/uv/uv
  for name in python3.12 python3.13; do
    if "$name" -c 'import ensurepip' &>/dev/null; then
      command -v "$name"
      return
    fi
  done
  if [[ ! -x $uv ]]; then
    curl -LsSf https://astral.sh/uv/install.sh |
      env UV_INSTALL_DIR="${uv%/*}" UV_NO_MODIFY_PATH=1 sh >&2
  fi
  "$uv" python install 3.12 >&2
  "$uv" python find --managed-python 3.12
}

stamp() {
  printf '%s %s\n' "$root" "$EXTRAS"
  cat "$root/pyproject.toml" "$root/constraints.txt"
}

setup() {
  cd "$root"
  local python
  if [[ ! -f $VENV/stamp || $(<"$VENV/stamp") != "$(stamp)" ]]; then
    python=$(python312)
    say "installing jaxrm[$EXTRAS] with $python"
    rm -rf "$VENV"
    "$python" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet -c constraints.txt -e ".[$EXTRAS]"
    stamp >"$VENV/stamp" # last: an interrupted set-up has none
  fi
  if [[ -n ${DATA:-} ]]; then
    mkdir -p data
    gcloud storage rsync --recursive "$DATA" data
  fi
  say 'ready'
}

pack() {
  cd "$root"
  local file
  git ls-files -z --cached --others --exclude-standard --deduplicate |
    while IFS= read -rd '' file; do [[ ! -e $file ]] || printf '%s\0' "$file"; done |
    tar --create --gzip --null --verbatim-files-from --files-from=-
}

# --- one run, in the foreground

output_dir() {
  local dir=''
  while (($#)); do
    case $1 in
      --output[-_]dir) dir=${2:-} ;;
      --output[-_]dir=*) dir=${1#*=} ;;
    esac
    shift
  done
  [[ -n $dir && $dir != /* ]] || fail "BUCKET is set: expected --output_dir DIR, found '$dir'"
  printf '%s\n' "${dir%/}"
}

is_first() {
  local index=${JAX_PROCESS_ID:-${SLURM_PROCID:-${TPU_WORKER_ID:-}}}
  if [[ -z $index ]]; then
    index=$(curl -sf -H 'Metadata-Flavor: Google' "$METADATA/agent-worker-number") ||
      fail 'BUCKET is set: expected JAX_PROCESS_ID, or a TPU VM, to tell which worker this is'
  fi
  [[ $index == 0 && ${MEGASCALE_SLICE_ID:-0} == 0 ]]
}

keep() {
  local status=0
  if [[ -n $first && -d $out ]]; then
    gcloud storage rsync --recursive --exclude='checkpoints/.*' "$out" "$BUCKET/$out" || status=1
  fi
  if [[ -n ${LOG:-} ]]; then
    gcloud storage cp "$LOG" "$BUCKET/$out/logs/$began-$(hostname).log" || status=1
  fi
  return "$status"
}

# Told to end, it finishes the copy that it is at.
keep_on() {
  local nap=''
  trap 'kill "$nap" 2>/dev/null; exit' TERM
  while :; do
    sleep "${KEEP:-300}" &>/dev/null &
    nap=$!
    wait "$nap"
    keep || say 'not kept: see above'
  done
}

# A trap ends a `wait` early: wait again until the child is gone.
await() {
  local status
  while :; do
    status=0
    wait "$1" || status=$?
    ((status > 128)) && kill -0 "$1" 2>/dev/null || return "$status"
  done
}

run() {
  local out='' first='' began child copier='' status=0
  began=$(date +%Y%m%dT%H%M%S)
  cd "$root"
  [[ ! -d $VENV ]] || PATH=$VENV/bin:$PATH
  if [[ -n ${BUCKET:-} ]]; then
    out=$(output_dir "$@")
    if is_first; then
      first=1
      mkdir -p "$out"
      printf '%q ' "$@" | gcloud storage cp - "$BUCKET/$out/command" # so that there is a folder
      gcloud storage rsync --recursive "$BUCKET/$out" "$out"
    fi
  fi
  "$@" &
  child=$!
  trap 'kill -TERM "$child" 2>/dev/null || true' TERM INT
  if [[ -n $out ]]; then
    keep_on 9>&- &
    copier=$!
  fi
  await "$child" || status=$?
  if [[ -n $out ]]; then
    kill "$copier" 2>/dev/null || true
    wait "$copier" || true
    say "$1 ended with status $status"
    keep || status=$((status > 0 ? status : 1))
  fi
  exit "$status"
}

# --- the same, detached

running() { [[ -f $STATE/lock ]] && ! flock --nonblock "$STATE/lock" true; }

start() {
  local words
  printf -v words '%q ' "$@"
  mkdir -p "$STATE"
  exec 9>>"$STATE/lock" # the run inherits it, and is on as long as it is held
  if ! flock --nonblock 9; then
    if [[ $(<"$STATE/command") != "$words" ]]; then
      say "another run is on: $(<"$STATE/command")"
      exit 3
    fi
    say 'running already'
    return
  fi
  rm -f "$STATE/status"
  printf '%s\n' "$words" | tee "$STATE/command" >>"$STATE/log"
  export STATE LOG=$STATE/log
  # shellcheck disable=SC2016
  setsid bash -c 'trap : TERM; bash "$0" run "$@"; echo "$?" >"$STATE/status"' \
    "$here/worker.sh" "$@" </dev/null >>"$STATE/log" 2>&1 &
  echo "$!" >"$STATE/pid"
  say "started: $words"
}

status() {
  if running; then
    echo running
  elif [[ -f $STATE/status && $(<"$STATE/status") == 0 ]]; then
    echo 'done'
  elif [[ -f $STATE/command ]]; then
    echo "failed $(cat "$STATE/status" 2>/dev/null || echo 137)" # 137: the machine went down
  else
    echo none
  fi
}

follow() {
  if running; then
    tail --lines=50 --follow=name --pid="$(<"$STATE/pid")" "$STATE/log"
  elif [[ -f $STATE/log ]]; then
    tail --lines=50 "$STATE/log"
  fi
  status
}

stop() {
  if running; then
    kill -TERM -- "-$(<"$STATE/pid")"
    flock --wait 600 "$STATE/lock" true || kill -KILL -- "-$(<"$STATE/pid")"
  fi
  status
}

command=${1:-}
shift || true
case $command in
  run | job | start) (($#)) || fail "$command: expected a command" ;;&
  setup | run | start | status | follow | stop | pack) "$command" "$@" ;;
  job)
    setup
    run "$@"
    ;;
  help | -h | --help) usage ;;
  *)
    usage >&2
    exit 2
    ;;
esac
