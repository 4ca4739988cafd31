#!/bin/bash
# Evaluate a run under missing modalities; several ranks share the clips and give the same results as one rank.
#
#   sbatch slurm/eval.sh                                           newest finished run, every subset, drop 0.0 to 0.9
#   sbatch slurm/eval.sh runs/epic_kitchens/distill --drop-prob 0.5
#   sbatch --ntasks-per-node=8 --gpus-per-node=8 slurm/eval.sh     on eight GPUs; --nodes=4 as well
#   sbatch --gpus-per-node=0 slurm/eval.sh                         without a GPU
#
# Submit from the checkout. The report is written to the run's eval/ folder.
#SBATCH --job-name=karmma-eval
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=12
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --output=%x_%j.log
#SBATCH --open-mode=append
##SBATCH --partition=gpu
##SBATCH --account=my_project

set -euo pipefail
outcome=
say() { echo "$(date -Is) job ${SLURM_JOB_ID:-without Slurm} $*"; }
fail() { outcome=": $*"; exit 2; }
trap 'outcome=": line $LINENO failed: $BASH_COMMAND"' ERR
trap 'say "ended with status $?$outcome"' EXIT  # every end says one line
for name in SLURM_JOB_ID SLURM_JOB_NODELIST; do
    [ -n "${!name:-}" ] || fail "$name is not set: submit this script with sbatch"
done

program=(karmma-dist)     # apptainer: (apptainer exec --nv karmma.sif karmma-dist)
container=()              # pyxis: (--container-image=karmma.sqsh --container-mounts="$PWD" --container-workdir="$PWD")

cd "${SLURM_SUBMIT_DIR:-.}"
# shellcheck source=/dev/null
if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi
if [ $# -eq 0 ]; then set -- --subsets --sweep --seeds 3; fi

# All ranks use the address of the first node as known to Slurm, since its name may not resolve.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || hosts=$SLURM_JOB_NODELIST
first=${hosts%%$'\n'*}
[[ $first =~ ^[^][,]+$ ]] || fail "scontrol show hostnames $SLURM_JOB_NODELIST does not name the first node"
MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p') || MASTER_ADDR=
[ -n "$MASTER_ADDR" ] || say "scontrol show node $first gives no address: ranks meet at the name $first"
export MASTER_ADDR=${MASTER_ADDR:-$first}
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun does not inherit it from sbatch

say "on $SLURM_JOB_NODELIST: eval $*"
status=0
srun --kill-on-bad-exit=0 --wait=60 "${container[@]}" "${program[@]}" eval "$@" || status=$?
[ "$status" -ne 127 ] || outcome=": srun or ${program[0]} is not found: install it, or activate its environment before sbatch"
exit "$status"
