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
outcome=
say() { echo "$(date -Is) job ${SLURM_JOB_ID:-without Slurm} $*"; }
fail() { outcome=": $*"; exit 2; }
trap 'outcome=": line $LINENO failed: $BASH_COMMAND"' ERR
trap 'say "ended with status $?$outcome"' EXIT  # every end says one line
trap : TERM USR2  # both reach the command started below, which saves

program=(karmma-dist)     # apptainer: (apptainer exec --nv karmma.sif karmma-dist)

cd "${SLURM_SUBMIT_DIR:-.}"
[ $# -gt 0 ] || fail "no arguments: submit this script with karmma-dist study STUDY --slurm"
if [ "$1" != report ]; then
    [ -f "$1" ] || fail "$1: no such script"
    [ -n "${SLURM_ARRAY_TASK_ID:-}" ] || fail "SLURM_ARRAY_TASK_ID is not set: submit this script with sbatch --array=..."
    [ $((SLURM_ARRAY_TASK_ID + 1)) -lt $# ] || fail "task $SLURM_ARRAY_TASK_ID of the array has no recipe: $(($# - 1)) are given"
    script=$1
    shift
    recipes=("$@")
    exec bash "$script" "${recipes[$SLURM_ARRAY_TASK_ID]}"
fi
shift
# shellcheck source=/dev/null
if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi
command -v "${program[0]}" > /dev/null || fail "${program[0]} is not found: activate its environment before sbatch"
exec "${program[@]}" study "$@"
