#!/bin/bash
# Run one training of a study per array task, or write a study's report; `karmma-dist study STUDY --slurm` submits it.
#
#   sbatch --array=0-4 slurm/study.sh slurm/distill.sh RECIPE_OF_TASK_0 ... RECIPE_OF_TASK_4
#   sbatch slurm/study.sh report STUDY --seeds 5                   evaluates what is finished and writes the report
#
# Submit from the checkout. Tasks are preempted, requeued and resumed like the script that they call.
#SBATCH --job-name=karmma-study
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=2-00:00:00
#SBATCH --signal=USR2@180
#SBATCH --requeue
#SBATCH --output=%x_%A_%a.log
#SBATCH --open-mode=append
##SBATCH --partition=gpu
##SBATCH --account=my_project

set -euo pipefail
trap : TERM USR2  # both reach the command started below, which saves

program=(karmma-dist)     # apptainer: (apptainer exec --nv karmma.sif karmma-dist)

cd "${SLURM_SUBMIT_DIR:-.}"
if [ "$1" != report ]; then
    script=$1
    shift
    recipes=("$@")
    exec bash "$script" "${recipes[$SLURM_ARRAY_TASK_ID]}"
fi
shift
# shellcheck source=/dev/null
if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi
exec "${program[@]}" study "$@"
