#!/usr/bin/env bash
# Slurm: a job of several nodes, one task per GPU (default) or one per node that holds all of its GPUs.
#
#   NODES=4 GPUS=8 launch/slurm.sh [--dry-run] t2i train configs/text_to_image.py --run /shared/runs/big
#
# PER=node starts one task a node; NAME (t2i), PARTITION, ACCOUNT, TIME (24:00:00), CPUS of a node (12 a GPU), LOGS (logs).
# The job comes back by itself: the signal before its end makes the run save, and then it is put in the queue again. So
# it is, up to RETRIES (10) times, after a failure that another try may mend: a process that died, or hung.
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
[ $# -ge 1 ] || usage

nodes=${NODES:-1} gpus=${GPUS:-8} logs=${LOGS:-logs}
case ${PER:-gpu} in
gpu) tasks=$gpus seen="" ;;
node) tasks=1 seen="export JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus - 1)))" ;;
*) echo "$0: PER=$PER: it is gpu or node" >&2 && exit 2 ;;
esac
cpus=$((${CPUS:-$((12 * gpus))} / tasks))
((cpus >= 1)) || { echo "$0: CPUS=${CPUS:-}: at least one for each of the $tasks tasks of a node" >&2 && exit 2; }
printf -v command '%q ' "$@"
# JAX finds coordinator, count and number of its process in Slurm's own variables, and with one task per GPU it takes
# the GPU of the task's number on its node; so all GPUs stay visible to all tasks, and a task that is to have them all
# gets their numbers. Since Slurm 22.05 a step does not have the CPUs of the job's tasks unless it asks for them again.
script=$(
  cat <<EOF
#!/usr/bin/env bash
#SBATCH --job-name=${NAME:-t2i}
#SBATCH --nodes=$nodes
#SBATCH --gres=gpu:$gpus
#SBATCH --ntasks-per-node=$tasks
#SBATCH --cpus-per-task=$cpus
#SBATCH --time=${TIME:-24:00:00}
#SBATCH --output=$logs/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@180
${PARTITION:+#SBATCH --partition=$PARTITION}
${ACCOUNT:+#SBATCH --account=$ACCOUNT}
set -uo pipefail
$seen
srun --kill-on-bad-exit=1 --cpus-per-task=$cpus $command
status=\$?
case \$status in
0 | 2 | 130) ;; # done; a config that cannot work; Ctrl-C
143) scontrol requeue "\$SLURM_JOB_ID" ;; # stopped by a signal, after a save
*) if [ "\${SLURM_RESTART_COUNT:-0}" -lt ${RETRIES:-10} ]; then scontrol requeue "\$SLURM_JOB_ID"; fi ;;
esac
exit \$status
EOF
)
if [ -n "${DRY_RUN:-}" ]; then
  echo "$script"
else
  mkdir -p "$logs"
  sbatch <<<"$script"
fi
