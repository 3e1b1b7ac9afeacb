#!/usr/bin/env bash
# A Cloud TPU VM slice: the code to every worker, then the same command on all of them, again after a preemption.
#
#   TPU=my-pod ZONE=us-east5-a launch/tpu_pod.sh [--dry-run] t2i train configs/big.py --run gs://bucket/runs/big
#
# PROJECT names the cloud project where it is not the default; RETRIES (10) bounds the restarts; SETUP=0 leaves out the
# copying and installing. The processes find each other by the metadata of the slice; T2I_CLUSTER=1 says that they must.
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
[ $# -ge 1 ] || usage
: "${TPU:?the name of the TPU VM}" "${ZONE:?the zone of the TPU VM}"

where=(--zone="$ZONE" ${PROJECT:+--project="$PROJECT"})
on_all() { run gcloud compute tpus tpu-vm ssh "$TPU" "${where[@]}" --worker=all --command="$1"; }

setup() {
  local archive
  archive=$(mktemp -t t2i_jax.XXXXXX.tar.gz)
  run git -C "$(dirname "$0")/.." archive --format=tar.gz --output="$archive" HEAD
  run gcloud compute tpus tpu-vm scp "$archive" "$TPU:t2i_jax.tar.gz" "${where[@]}" --worker=all
  rm -f "$archive"
  on_all "mkdir -p t2i_jax && tar xzf t2i_jax.tar.gz -C t2i_jax && python3 -m venv env && env/bin/pip install -q './t2i_jax[tpu,data,gcs]'"
}

# The command on a worker: what a dead run left on the chips ends first, by the lock that only one process can hold.
printf -v quoted '%q ' "$@"
remote="cd t2i_jax && T2I_CLUSTER=1 PATH=\$HOME/env/bin:\$PATH exec flock --wait 60 /tmp/t2i_jax.lock $quoted"
for ((attempt = 0; attempt <= ${RETRIES:-10}; attempt++)); do
  status=0
  if [ "${SETUP:-1}" = 1 ]; then setup || status=$?; fi # a slice that was made anew has empty disks
  if [ $status = 0 ]; then on_all "$remote" || status=$?; fi
  case $status in
  0 | 2 | 130) exit "$status" ;; # done; a config that cannot work; Ctrl-C
  esac
  echo "$0: status $status, starting again in ${PAUSE:-60} s" >&2
  sleep "${PAUSE:-60}"
done
exit "$status"
