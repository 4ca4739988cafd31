#!/bin/bash
# Train on the nodes of a job. Sourced by distill.sh and teacher.sh, which have the #SBATCH lines and are submitted.
#
#   . slurm/train.sh DEFAULT_RECIPE [RECIPE] [OPTIONS OF karmma-dist train]
#
# The shell of the submitted script reads this file completely before it runs the first line, since the checkout may
# change while the job runs.

set -euo pipefail
outcome=
say() { echo "$(date -Is) job ${SLURM_JOB_ID:-without Slurm} $*"; }
fail() { outcome=": $*"; exit 2; }
trap 'outcome=": line $LINENO failed: $BASH_COMMAND"' ERR
trap 'say "ended with status $?$outcome"' EXIT  # every end says one line
for name in SLURM_JOB_ID SLURM_JOB_NODELIST SLURM_JOB_NUM_NODES; do
    [ -n "${!name:-}" ] || fail "$name is not set: submit this script with sbatch"
done

recipe=$1
shift
if [ $# -gt 0 ] && [[ $1 != --* ]]; then recipe=$1; shift; fi
[ -n "$recipe" ] || fail "the recipe is an empty argument"
settings=()  # the arguments that doctor needs as well
for ((i = 1; i <= $#; i++)); do
    next=$((i + 1))
    case ${!i} in
    --set) [ "$next" -le $# ] || fail "--set is the last argument: KEY=VALUE is missing"; settings+=(--set "${!next}") ;;
    --set=*) settings+=("${!i}") ;;
    esac
done
restarts=${SLURM_RESTART_COUNT:-0}
max_restarts=${KARMMA_DIST_MAX_RESTARTS:-20}
program=(karmma-dist)     # apptainer: (apptainer exec --nv karmma.sif karmma-dist)
container=()              # pyxis: (--container-image=karmma.sqsh --container-mounts="$PWD" --container-workdir="$PWD")

cd "${SLURM_SUBMIT_DIR:-.}"
# shellcheck source=/dev/null
if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi
[[ $restarts$max_restarts =~ ^[0-9]+$ ]] || fail "KARMMA_DIST_MAX_RESTARTS=$max_restarts is not a number"
if [ "$restarts" -gt "$max_restarts" ]; then
    outcome=": not started: it was restarted $restarts times and may be $max_restarts times; submit it again to go on"
    exit 1
fi

# All ranks use the address of the first node as known to Slurm, since its name may not resolve.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || hosts=$SLURM_JOB_NODELIST
first=${hosts%%$'\n'*}
[[ $first =~ ^[^][,]+$ ]] || fail "scontrol show hostnames $SLURM_JOB_NODELIST does not name the first node"
MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p') || MASTER_ADDR=
[ -n "$MASTER_ADDR" ] || say "scontrol show node $first gives no address: ranks meet at the name $first"
export MASTER_ADDR=${MASTER_ADDR:-$first}
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun does not inherit it from sbatch

say "on $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST), restart $restarts of at most $max_restarts: $recipe $*"
status=0
if [ "${KARMMA_DIST_PREFLIGHT:-1}" != 0 ]; then  # checks device, shards, run folder and network of every rank in at most a minute
    srun --label --kill-on-bad-exit=0 --wait=60 "${container[@]}" "${program[@]}" \
        doctor --distributed "$recipe" "${settings[@]}" || status=$?
fi
# Ranks end together after saving; none is killed while others exit, so that srun returns their status 85.
[ "$status" -ne 0 ] ||
    srun --label --kill-on-bad-exit=0 --wait=60 "${container[@]}" "${program[@]}" train "$recipe" "$@" || status=$?

[ "$status" -ne 127 ] || outcome=": srun or ${program[0]} is not found: install it, or activate its environment before sbatch"
reason=
if [ "$status" -ne 0 ] && [ "$(squeue --noheader --job "$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
    # The job was not cancelled, and Slurm has not requeued it itself.
    if [ "$status" -eq 85 ]; then
        reason="saved"
    elif [ "$status" -eq 140 ] || [ "$status" -eq 143 ]; then
        reason="warned before it had begun"  # USR2 or TERM ended a rank that did not handle signals yet
    elif [ "$status" -ne 127 ] && ! timeout 60 srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 true; then
        reason="a node is gone"
    fi
fi
if [ -n "$reason" ] && [ "$restarts" -lt "$max_restarts" ]; then
    trap - EXIT
    say "ended with status $status, $reason: requeued"
    scontrol requeue "$SLURM_JOB_ID" || say "is not requeued: Slurm refused"
elif [ -n "$reason" ]; then
    outcome=", $reason: not requeued after $restarts restarts; submit it again to go on"
fi
exit "$status"
