#!/usr/bin/env bash
# A run on TPUs of a GKE cluster that XPK made: one pod a host, each of which does
# `worker.sh job CMD...`. A run that is preempted (status 143) is restarted and goes on.
#
#   xpk.sh CMD...      sends this checkout and starts CMD on all hosts
#   xpk.sh --help
#
# Settings: PROJECT ZONE CLUSTER NAME ACCELERATOR (as tpu.sh) and IMAGE, from the environment or
# the file CONFIG (pod.env); BUCKET DATA EXTRAS KEEP as in worker.sh. DRY_RUN=1 prints the command.
# State and logs: `xpk workload list --cluster CLUSTER`, `kubectl logs`; results lie in BUCKET/DIR
# (tpu.sh fetch DIR); the end: `xpk workload delete --cluster CLUSTER --workload NAME`.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
case ${1:---help} in
  -h | --help)
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit $(($# ? 0 : 2))
    ;;
esac
config=${CONFIG:-$here/pod.env}
# shellcheck source=/dev/null
[[ ! -f $config ]] || . "$config"
for needed in PROJECT ZONE CLUSTER NAME ACCELERATOR BUCKET; do
  [[ -n ${!needed:-} ]] || {
    echo "xpk.sh: $needed is not set" >&2
    exit 1
  }
done

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
bash "$here/worker.sh" pack | tar --extract --gzip --directory="$folder"
# exec: the signal that ends a pod reaches the run, which saves.
printf -v words '%q ' exec env BUCKET="${BUCKET%/}" DATA="${DATA:-}" EXTRAS="${EXTRAS:-}" \
  KEEP="${KEEP:-}" bash tpu_scripts/worker.sh job "$@"
create=(xpk workload create --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER"
  --workload="$NAME" --tpu-type="$ACCELERATOR" --num-slices=1 --max-restarts=50
  --termination-grace-period-seconds=120 --script-dir="$folder"
  --base-docker-image="${IMAGE:-gcr.io/google.com/cloudsdktool/google-cloud-cli:slim}"
  --command="${words% }")
if [[ -n ${DRY_RUN:-} ]]; then
  printf '%q ' "${create[@]}"
  echo
else
  "${create[@]}"
fi
