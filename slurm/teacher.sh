#!/bin/bash
# Train the teacher on several nodes; unfinished unimodal encoders that it builds on are trained first.
#
#   sbatch slurm/teacher.sh                                        recipes/epic_kitchens/teacher.yaml
#   sbatch slurm/teacher.sh RECIPE --set training.epochs=50        another recipe, with overrides
#   sbatch --nodes=4 --partition=a100 slurm/teacher.sh             sbatch flags override the lines below
#   sbatch --gpus-per-node=0 --ntasks-per-node=1 slurm/teacher.sh  without GPUs: one rank per node
#
# Submit from the checkout. When the job is preempted, reaches its time limit or loses a node, it saves if it still can,
# is requeued, and resumes. After any other end, the same command continues the run.
#SBATCH --job-name=karmma-teacher
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
trap : TERM USR2  # both reach the ranks, which save; this shell stays to report the end

train=${SLURM_SUBMIT_DIR:-.}/slurm/train.sh  # Slurm runs a copy of this file in a folder without train.sh
[ -f "$train" ] || # launched from an installation: Slurm knows the path of the original, arguments follow its ".sh"
    train=$(scontrol show job "${SLURM_JOB_ID:-}" | sed -n -e 's|^ *Command=||;T' -e 's|\.sh\( .*\)*$||;t folder' \
        -e 's| .*||' -e ':folder' -e 's|/[^/]*$|/train.sh|p' | sort -u) || true
[ -f "$train" ] || { echo "error: ${SLURM_SUBMIT_DIR:-.}: no slurm/train.sh: submit from the checkout" >&2; exit 2; }
# shellcheck source=slurm/train.sh
. "$train" recipes/epic_kitchens/teacher.yaml "$@"
