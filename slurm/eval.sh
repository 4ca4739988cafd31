#!/bin/bash
# Evaluate a run under missing modalities on one GPU.
#
#   sbatch slurm/eval.sh                                           newest finished run, every subset, drop 0.0 to 0.9
#   sbatch slurm/eval.sh runs/epic_kitchens/distill --drop-prob 0.5
#
# Submit from the checkout. The report lands in the run's eval/ folder.
#SBATCH --job-name=karmma-eval
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=12
#SBATCH --time=04:00:00
#SBATCH --output=%x_%j.log
#SBATCH --open-mode=append
##SBATCH --partition=gpu
##SBATCH --account=my_project

set -euo pipefail

cd "${SLURM_SUBMIT_DIR:-.}"
if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi
if [ $# -eq 0 ]; then set -- --subsets --sweep --seeds 3; fi

echo "$(date -Is) job $SLURM_JOB_ID on $SLURM_JOB_NODELIST: karmma-dist eval $*"
status=0
srun karmma-dist eval "$@" || status=$?
echo "$(date -Is) job $SLURM_JOB_ID ended with status $status"
exit "$status"
