#!/usr/bin/env bash
# The first GPU of this machine against its goals, in at most 8 minutes: every kernel against reference attention, a
# train step of 0.8B, decoding of 1, 8, 64 and 256 images.
#
#   launch/gpu_check.sh [--dry-run] check.json
#
# The JSON has the goal, the figure and pass or fail of each; it is written anew after each check, so that what was
# measured is there whatever happens. Status 1: a goal was missed. More words go to `t2i bench check`.
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
[ $# -ge 1 ] || usage
out=$1
shift
export CUDA_VISIBLE_DEVICES=${GPUS:-0}
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
run timeout --signal=INT --kill-after=10 470 t2i bench check --out "$out" "$@"
if [ -z "${DRY_RUN:-}" ] && grep -q '"passed": false' "$out"; then exit 1; fi
