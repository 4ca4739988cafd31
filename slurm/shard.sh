#!/bin/bash
# Pack a raw dataset into shards with an array of jobs, each packing its part of the recordings.
#
#   sbatch slurm/shard.sh                                          shards/epic_kitchens.yaml
#   sbatch --array=1-8 slurm/shard.sh something_something --raw /data/ssv2
#
# Submit from the checkout. The part that ends last assembles the shards. After an interruption, submit the same command
# again: finished parts end at once, and the others do the remaining work.
#SBATCH --job-name=karmma-shard
#SBATCH --array=1-16
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --output=%x_%A_%a.log
#SBATCH --open-mode=append
##SBATCH --partition=cpu
##SBATCH --account=my_project

set -euo pipefail
outcome=
say() { echo "$(date -Is) job ${SLURM_JOB_ID:-without Slurm} $*"; }
fail() { outcome=": $*"; exit 2; }
trap 'outcome=": line $LINENO failed: $BASH_COMMAND"' ERR
trap 'say "ended with status $?$outcome"' EXIT  # every end says one line
for name in SLURM_JOB_ID SLURM_JOB_NODELIST SLURM_ARRAY_TASK_{ID,MIN,MAX,COUNT}; do
    [ -n "${!name:-}" ] || fail "$name is not set: submit this script with sbatch, as an array: sbatch --array=1-8 ..."
done

spec=epic_kitchens
if [ $# -gt 0 ] && [[ $1 != --* ]]; then spec=$1; shift; fi
[ -n "$spec" ] || fail "the specification is an empty argument"
program=(karmma-dist)     # apptainer: (apptainer exec karmma.sif karmma-dist)
container=()              # pyxis: (--container-image=karmma.sqsh --container-mounts="$PWD" --container-workdir="$PWD")

cd "${SLURM_SUBMIT_DIR:-.}"
# shellcheck source=/dev/null
if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun does not inherit it from sbatch

if [ "$SLURM_ARRAY_TASK_MIN" -ne 1 ] || [ "$SLURM_ARRAY_TASK_COUNT" -ne "$SLURM_ARRAY_TASK_MAX" ]; then
    fail "the array's numbers must be 1-N without gaps, each of the N jobs packs one part: sbatch --array=1-8 ..."
fi
part="$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_MAX"

say "on $SLURM_JOB_NODELIST: $spec, part $part $*"
status=0
srun "${container[@]}" "${program[@]}" shard "$spec" --part "$part" --workers "$SRUN_CPUS_PER_TASK" "$@" || status=$?
[ "$status" -ne 127 ] || outcome=": srun or ${program[0]} is not found: install it, or activate its environment before sbatch"
exit "$status"
