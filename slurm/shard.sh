#!/bin/bash
# Pack a raw dataset into shards with an array of jobs, each taking its part of the recordings.
#
#   sbatch slurm/shard.sh                                          shards/epic_kitchens.yaml
#   sbatch --array=1-8 slurm/shard.sh something_something --raw /data/ssv2
#
# Submit from the checkout. Whichever part ends last puts the shards together; a part that was interrupted is
# submitted again (sbatch --array=7 ...) and does only what is left.
#SBATCH --job-name=karmma-shard
#SBATCH --array=1-16
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --output=%x_%A_%a.log
#SBATCH --open-mode=append
##SBATCH --partition=cpu
##SBATCH --account=my_project

set -euo pipefail

spec=epic_kitchens
if [ $# -gt 0 ] && [[ $1 != --* ]]; then spec=$1; shift; fi

cd "${SLURM_SUBMIT_DIR:-.}"
if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi

part="$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_MAX"
echo "$(date -Is) job $SLURM_JOB_ID on $SLURM_JOB_NODELIST: $spec, part $part $*"
status=0
srun karmma-dist shard "$spec" --part "$part" --workers "${SLURM_CPUS_PER_TASK:-1}" "$@" || status=$?
echo "$(date -Is) job $SLURM_JOB_ID ended with status $status"
exit "$status"
