#!/usr/bin/env bash
# Several processes on this machine that train together, as hosts of a cluster would: for trying things out.
#
#   launch/loopback.sh [--dry-run] 2 4 t2i train configs/glyphs_ar.py --run runs/two --mesh.data=8
#
# starts 2 processes with 4 fake CPU devices each. PORT (29500) is where they find each other.
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
[ $# -ge 3 ] || usage
processes=$1 devices=$2
shift 2
for number in "$processes" "$devices"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || { echo "$0: '$number': first come the numbers of processes and of devices" >&2 && exit 2; }
done
export JAX_COORDINATOR_ADDRESS="127.0.0.1:${PORT:-29500}" JAX_NUM_PROCESSES=$processes JAX_PLATFORMS=cpu
export XLA_FLAGS="--xla_force_host_platform_device_count=$devices"
if [ -n "${DRY_RUN:-}" ]; then
  for ((i = 0; i < processes; i++)); do echo "JAX_PROCESS_ID=$i $*"; done
  exit 0
fi
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT
for ((i = 0; i < processes; i++)); do
  JAX_PROCESS_ID=$i "$@" &
  pids+=($!)
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit "$status"
