#!/usr/bin/env bash
# One machine with some GPUs (or none): a single process that uses them all, started again when it was stopped.
#
#   launch/gpu_box.sh [--dry-run] t2i train configs/glyphs_ar.py --mesh.data=-1
#
# GPUS=0,1 takes only these; RETRIES (10) bounds the restarts. A wrong config (status 2) is not tried again.
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
[ $# -ge 1 ] || usage

[ -z "${GPUS:-}" ] || export CUDA_VISIBLE_DEVICES=$GPUS
# Most of the memory for the arrays from the start: no fragments later.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
for ((attempt = 0; attempt <= ${RETRIES:-10}; attempt++)); do
  status=0
  run "$@" || status=$?
  case $status in
  0 | 2 | 130) exit "$status" ;; # done; a config that cannot work; Ctrl-C
  esac
  echo "$0: status $status, starting again in ${PAUSE:-10} s" >&2
  sleep "${PAUSE:-10}"
done
exit "$status"
