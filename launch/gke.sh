#!/usr/bin/env bash
# Google Kubernetes Engine: through xpk where it is installed, or by the JobSet manifest beside this file.
#
#   CLUSTER=c ZONE=us-east5-a IMAGE=registry/t2i_jax launch/gke.sh [--dry-run] xpk NAME v5litepod-256 t2i train ...
#   IMAGE=registry/t2i_jax launch/gke.sh [--dry-run] jobset NAME v5e:16x16 t2i train configs/big.py --run gs://...
#
# `jobset` writes the manifest for that topology to standard output with --dry-run, and gives it to kubectl without.
# RETRIES (10) bounds the restarts, each of which starts all hosts anew.
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
[ $# -ge 4 ] || usage
: "${IMAGE:?the container image, made with launch/Dockerfile}"
how=$1 name=$2 chips=$3
shift 3

case $how in
xpk)
  : "${CLUSTER:?the name of the cluster}" "${ZONE:?its zone}"
  printf -v quoted '%q ' "$@"
  run xpk workload create --cluster="$CLUSTER" --zone="$ZONE" --workload="$name" --tpu-type="$chips" \
    --docker-image="$IMAGE" --max-restarts="${RETRIES:-10}" --command="$quoted"
  ;;
jobset)
  shape=${chips#*:}
  case ${chips%%:*} in
  v5e) accelerator=tpu-v5-lite-podslice ;;
  v5p) accelerator=tpu-v5p-slice ;;
  v6e) accelerator=tpu-v6e-slice ;;
  *) echo "$0: $chips: it is written like v5e:16x16, v5p:4x4x4 or v6e:16x16" >&2 && exit 2 ;;
  esac
  # Four chips a host, on slices of several hosts.
  total=$((${shape//x/*})) per_host=4
  ((total >= 4)) || per_host=$total
  # A JSON list of strings is YAML too; quotes and backslashes are the ones to be careful with.
  list=""
  for word in "$@"; do
    word=${word//\\/\\\\}
    list+="${list:+, }\"${word//\"/\\\"}\""
  done
  manifest=$(NAME=$name ACCELERATOR=$accelerator TOPOLOGY=$shape HOSTS=$((total / per_host)) CHIPS=$per_host \
    COMMAND="[$list]" RETRIES=${RETRIES:-10} IMAGE=$IMAGE \
    awk '{ done = ""
      while (match($0, /\$\{[A-Z]+\}/)) {
        done = done substr($0, 1, RSTART - 1) ENVIRON[substr($0, RSTART + 2, RLENGTH - 3)]
        $0 = substr($0, RSTART + RLENGTH)
      }
      print done $0 }' \
    "$(dirname "$0")/jobset.yaml")
  if [ -n "${DRY_RUN:-}" ]; then echo "$manifest"; else kubectl apply -f - <<<"$manifest"; fi
  ;;
*) usage ;;
esac
