#!/usr/bin/env bash
# Google Kubernetes Engine: through xpk where it is installed, or by the JobSet that jobset.py of this folder writes.
#
#   CLUSTER=c ZONE=us-east5-a IMAGE=registry/t2i_jax launch/gke.sh [--dry-run] xpk NAME v5litepod-256 t2i train ...
#   IMAGE=registry/t2i_jax launch/gke.sh [--dry-run] jobset NAME v5e:16x16 t2i train configs/text_to_image.py --run gs://...
#
# SLICES (1) is the number of slices that train together, RETRIES (10) bounds the restarts, each of which starts all
# hosts again. Flags before the command are xpk's own: --env=A=1, --priority=high, --spot.
# `jobset` writes the manifest to standard output with --dry-run, and gives it to kubectl without; more variables fit it
# to a cluster, for TPUs and GPUs (h100:64): launch/jobset.py --help lists them.
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
[ $# -ge 4 ] || usage
: "${IMAGE:?the container image, made with launch/Dockerfile}"
how=$1 name=$2 chips=$3
shift 3

case $how in
xpk)
  : "${CLUSTER:?the name of the cluster}" "${ZONE:?its zone}"
  flags=()
  while [[ ${1:-} == --* ]]; do
    flags+=("$1")
    shift
  done
  [ $# -ge 1 ] || usage
  case $chips in
  v[0-9]* | tpu*) flags+=(--tpu-type="$chips") ;;
  *) flags+=(--device-type="$chips") ;;
  esac
  [ -z "${SLICES:-}" ] || flags+=(--num-slices="$SLICES")
  printf -v quoted '%q ' "$@"
  # xpk itself repeats what a signal ended; 1 is a process that failed, 75 one that hung or lost the others.
  run xpk workload create --cluster="$CLUSTER" --zone="$ZONE" --workload="$name" --docker-image="$IMAGE" \
    --max-restarts="${RETRIES:-10}" --restart-on-exit-codes=1,75 "${flags[@]}" --command="$quoted"
  ;;
jobset)
  manifest=$("${PYTHON:-python3}" "$(dirname "$0")/jobset.py" "$name" "$chips" "$@")
  if [ -n "${DRY_RUN:-}" ]; then echo "$manifest"; else kubectl apply -f - <<<"$manifest"; fi
  ;;
*) usage ;;
esac
