#!/bin/bash
# Train a student from a teacher on several nodes; the teacher, where it is not finished, is trained first.
#
#   sbatch slurm/distill.sh                                        recipes/epic_kitchens/distill.yaml
#   sbatch slurm/distill.sh RECIPE --set training.epochs=50        another recipe, with overrides
#   sbatch --nodes=4 --partition=a100 slurm/distill.sh             any sbatch flag wins over the lines below
#   sbatch --gpus-per-node=0 --ntasks-per-node=1 slurm/distill.sh  without GPUs: one rank per node
#
# Submit from the checkout. Preempted, near its time limit or robbed of a node, the job saves if it still can, goes back
# into the queue and resumes. After any other end the same command continues the run.
#SBATCH --job-name=karmma-distill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=2-00:00:00
#SBATCH --signal=USR2@180
#SBATCH --requeue
#SBATCH --output=%x_%j.log
#SBATCH --open-mode=append
##SBATCH --partition=gpu
##SBATCH --account=my_project

set -euo pipefail
trap : TERM USR2  # both reach the ranks, which save; this shell stays to say how it ended

recipe=recipes/epic_kitchens/distill.yaml
if [ $# -gt 0 ] && [[ $1 != --* ]]; then recipe=$1; shift; fi
restarts=${SLURM_RESTART_COUNT:-0}
max_restarts=${KARMMA_DIST_MAX_RESTARTS:-20}
program=(karmma-dist)     # apptainer: (apptainer exec --nv karmma.sif karmma-dist)
container=()              # pyxis: (--container-image=karmma.sqsh --container-mounts="$PWD" --container-workdir="$PWD")

say() { echo "$(date -Is) job $SLURM_JOB_ID $*"; }

cd "${SLURM_SUBMIT_DIR:-.}"
if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi
if [ "$restarts" -gt "$max_restarts" ]; then
    say "not started: it was restarted $restarts times and may be $max_restarts times; submit it again to go on"
    exit 1
fi

# One address for all ranks: the first node's, as Slurm knows it (its name need not resolve).
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${hosts%%$'\n'*}
MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR=${MASTER_ADDR:-$first}
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun does not take it over from sbatch

say "on $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST), restart $restarts of at most $max_restarts: $recipe $*"
status=0
if [ "${KARMMA_DIST_PREFLIGHT:-1}" -ne 0 ]; then  # a minute at most: device, shards, run folder and network of every rank
    settings=()
    for ((i = 1; i <= $#; i++)); do
        next=$((i + 1))
        case ${!i} in --set) settings+=(--set "${!next}") ;; --set=*) settings+=("${!i}") ;; esac
    done
    srun --label --kill-on-bad-exit=0 --wait=60 "${container[@]}" "${program[@]}" \
        doctor --distributed "$recipe" "${settings[@]}" || status=$?
fi
# Ranks that saved end together: none is killed while others leave, so that their status 85 is srun's.
[ "$status" -ne 0 ] ||
    srun --label --kill-on-bad-exit=0 --wait=60 "${container[@]}" "${program[@]}" train "$recipe" "$@" || status=$?

reason=
if [ "$status" -ne 0 ] && [ "$(squeue --noheader --job "$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
    # Nobody cancelled the job, and Slurm has not requeued it itself.
    if [ "$status" -eq 85 ]; then
        reason="saved"
    elif [ "$status" -eq 140 ] || [ "$status" -eq 143 ]; then
        reason="warned before it had begun"  # USR2 or TERM ended a rank that did not listen yet
    elif ! timeout 60 srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 true; then
        reason="a node is gone"
    fi
fi
if [ -n "$reason" ] && [ "$restarts" -lt "$max_restarts" ]; then
    say "ended with status $status, $reason: requeued"
    scontrol requeue "$SLURM_JOB_ID" || say "is not requeued: Slurm refused"
elif [ -n "$reason" ]; then
    say "ended with status $status, $reason: not requeued after $restarts restarts; submit it again to go on"
else
    say "ended with status $status"
fi
exit "$status"
