#!/bin/bash
# Train a student from a teacher on several nodes; the teacher, where it is not finished, is trained first.
#
#   sbatch slurm/distill.sh                                        recipes/epic_kitchens/distill.yaml
#   sbatch slurm/distill.sh RECIPE --set training.epochs=50        another recipe, with overrides
#   sbatch --nodes=4 --partition=a100 slurm/distill.sh             any sbatch flag wins over the lines below
#
# Submit from the checkout; run the same command again to continue an interrupted run.
#SBATCH --job-name=karmma-distill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=2-00:00:00
#SBATCH --output=%x_%j.log
#SBATCH --open-mode=append
##SBATCH --partition=gpu
##SBATCH --account=my_project

set -euo pipefail

recipe=recipes/epic_kitchens/distill.yaml
if [ $# -gt 0 ] && [[ $1 != --* ]]; then recipe=$1; shift; fi

cd "${SLURM_SUBMIT_DIR:-.}"
if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi

# One address for all ranks: the first node's, as Slurm knows it (its name need not resolve).
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${hosts%%$'\n'*}
MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR=${MASTER_ADDR:-$first}
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

echo "$(date -Is) job $SLURM_JOB_ID on $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST): $recipe $*"
status=0
srun --kill-on-bad-exit=1 karmma-dist train "$recipe" "$@" || status=$?
echo "$(date -Is) job $SLURM_JOB_ID ended with status $status"
exit "$status"
