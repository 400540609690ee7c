#!/usr/bin/env bash
''':'
# launch.sh RECIPE [key=value ...] [--fresh] [--dry-run]    starts all ranks of `longpretrain train`
#   RANKS=2           how many (default: one per GPU of CUDA_VISIBLE_DEVICES, else of the machine; one
#                     without GPUs; in a Slurm allocation its tasks)
#   LAUNCHER=...      deepspeed (default), torchrun, mpirun, srun (default in a Slurm allocation), or
#                     sbatch: submits slurm/pretrain.sbatch with the options of slurm/env.sh
#   MASTER_PORT=...   where ranks meet (default: a free port)
# --dry-run prints the command (and the script that sbatch would get), then the recipe as resolved.
# USR1, USR2 and TERM stop a run, which leaves a checkpoint.
# A rank that a launcher starts runs this same file as Python: see below. A Slurm step with a terminal and
# one task (the shell of salloc or srun --pty) starts ranks; any other step (srun -n2 ./launch.sh) is a rank.
set -euo pipefail
here=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
export PATH="$here/.venv/bin:$PATH" PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
overlap=()
if [[ -z ${LONGPRETRAIN_LAUNCHER:-} && -n ${SLURM_PTY_PORT:-} && ${SLURM_STEP_NUM_TASKS:-1} == 1 ]]; then
    overlap=(--overlap)  # that shell holds what it was given
    unset SLURM_STEP_ID
    [[ ${PMI_SIZE:-1} != 1 ]] || unset PMI_RANK PMIX_RANK
fi
for mark in LONGPRETRAIN_LAUNCHER LOCAL_RANK SLURM_STEP_ID PMI_RANK PMIX_RANK OMPI_COMM_WORLD_RANK; do
    [[ -n ${!mark:-} ]] || continue
    [[ -z ${RANKS:-} ]] || export LONGPRETRAIN_WORLD_SIZE=${LONGPRETRAIN_WORLD_SIZE:-$RANKS}
    trap '' USR1 USR2  # until Python listens; launch.sh sends them again
    exec python -u "$here/launch.sh" "$@"
done

refuse() { echo "launch.sh: $1" >&2; exit 2; }
show() {  # a command as it would run
    local words=() word
    for word in "$@"; do [[ $word == --dry-run ]] || words+=("$word"); done
    printf '%q ' "${words[@]}"; echo
}
command -v python >/dev/null || refuse "python: got none on PATH and no $here/.venv; wanted an environment with longpretrain. Run make setup there, or activate one."
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)  # those of MIG follow, indented
visible=()
if [[ $gpus -gt 0 && -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    [[ $CUDA_VISIBLE_DEVICES == -1 ]] || IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
    gpus=${#visible[@]}
fi
LAUNCHER=${LAUNCHER:-$([[ -n ${SLURM_JOB_ID:-} ]] && echo srun || echo deepspeed)}
container=() sbatch_options=()
if [[ $LAUNCHER == srun || $LAUNCHER == sbatch ]]; then
    set +u  # modules and what a site adds often ask for variables that are not set
    # shellcheck source=slurm/env.sh
    source "$here/slurm/env.sh"
    set -u
    read -ra container <<<"${LONGPRETRAIN_CONTAINER:-}"
fi
if [[ $LAUNCHER == sbatch ]]; then
    [[ -z ${RANKS:-} ]] || refuse "RANKS: got $RANKS with LAUNCHER=sbatch; wanted the tasks of a job. Set sbatch_options in slurm/env.sh."
    resolved=$(python -m longpretrain train --dry-run "$@")
    export LONGPRETRAIN_PROJECT=$here
    unset LAUNCHER  # or the job would submit jobs
    start=(sbatch "${sbatch_options[@]}" "$here/slurm/pretrain.sbatch")
    [[ " $* " == *" --dry-run "* ]] || exec "${start[@]}" "$@"
    show "${start[@]}" "$@"
    cat "$here/slurm/pretrain.sbatch"; echo "$resolved"
    exit
fi
# A variable that hides all GPUs: deepspeed shows its ranks one even so; they read this.
[[ ${CUDA_VISIBLE_DEVICES-0} != "" && ${CUDA_VISIBLE_DEVICES-0} != -1 ]] || export LONGPRETRAIN_NO_GPU=1
[[ $LAUNCHER != srun ]] || RANKS=${RANKS:-${SLURM_NTASKS:-1}}
RANKS=${RANKS:-$((gpus > 0 ? gpus : 1))}
[[ $RANKS =~ ^[1-9][0-9]*$ ]] || refuse "RANKS: got $RANKS; wanted 1 or more. Set it, or leave it out."
export LONGPRETRAIN_WORLD_SIZE=$RANKS
threads=${SLURM_CPUS_PER_TASK:-$(($(nproc) > RANKS ? $(nproc) / RANKS : 1))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}
port=${MASTER_PORT:-$((RANDOM % 10000 + 10000))}  # below those that the system deals out to connections
while [[ -z ${MASTER_PORT:-} ]] && (: </dev/tcp/127.0.0.1/"$port") 2>/dev/null; do port=$((RANDOM % 10000 + 10000)); done
case $LAUNCHER in
    # It counts accelerators itself. A job is not told, which may get GPUs that this machine lacks.
    deepspeed) [[ $gpus -gt 0 ]] || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} ;;&
    deepspeed) start=(deepspeed --quiet --num_accelerators "$RANKS" --master_port "$port" "$here/launch.sh") ;;&
    deepspeed)
        [[ ${#visible[@]} -eq 0 ]] || { # beside a number it would take the first GPUs of the machine
            [[ $RANKS -le $gpus ]] || refuse "RANKS: got $RANKS; wanted at most $gpus, as CUDA_VISIBLE_DEVICES is $CUDA_VISIBLE_DEVICES. Set one of them otherwise."
            chosen=$(IFS=,; echo "${visible[*]:0:RANKS}")
            [[ $chosen =~ ^[0-9,]+$ ]] || refuse "CUDA_VISIBLE_DEVICES: got $chosen; wanted numbers, the only names that deepspeed takes. Set those, or LAUNCHER=torchrun."
            start=(deepspeed --quiet --include "localhost:$chosen" --master_port "$port" "$here/launch.sh")
        } ;;
    torchrun) start=(torchrun --nproc-per-node "$RANKS" --master-port "$port" "$here/launch.sh") ;;
    mpirun) start=(mpirun -n "$RANKS" "$here/launch.sh") ;;
    srun) start=(srun "${overlap[@]}" --kill-on-bad-exit=1 --ntasks "$RANKS" "${container[@]}" "$here/launch.sh") ;;
    *) refuse "LAUNCHER: got $LAUNCHER; wanted deepspeed, torchrun, mpirun, srun or sbatch. Choose one, or leave it out." ;;
esac
if [[ " $* " == *" --dry-run "* ]]; then
    show "${start[@]}" "$@"
    exec python -m longpretrain train "$@"
fi
asked=
for signal in INT TERM HUP USR1 USR2; do
    # shellcheck disable=SC2064  # the name is of now
    trap "asked=$signal" $signal
done
python -m longpretrain train --check "$@" || exit
[[ -z $asked ]] || { echo "launch.sh: stopped by $asked before the ranks started" >&2; exit 75; }
export LONGPRETRAIN_LAUNCHER=$LAUNCHER

# deepspeed and torchrun die of USR1 and kill their ranks at TERM: there, what asks to stop goes to the
# ranks alone, which then leave a checkpoint. All of them are in a process group of their own. mpirun and
# srun pass USR1 on, but may kill at INT and TERM: they get INT for a second Ctrl-C only.
# shellcheck disable=SC2329  # called by the traps
send() {
    local rank="-u ${here//[^[:alnum:]\/_-]/.}/launch\.sh"
    case $LAUNCHER in
        deepspeed) pkill "-$1" -g "$group" -f -- "$rank" ;;
        torchrun) pkill "-$1" -P "$group" -f -- "$rank" ;;
        *) kill "-$pass_on" "$group" ;;
    esac
}
# shellcheck disable=SC2329
stop() {
    send "$1" || kill -TERM -- "-$group" 2>/dev/null || true
    [[ $1 != INT ]] || { pass_on=INT; return; }
    # A rank that just starts does not listen yet: it is told until it has ended.
    [[ -n $repeat ]] || { while sleep 2; do send "$1" || true; done 2>/dev/null & repeat=$!; disown; }
}
begin() {
    case $LAUNCHER in deepspeed | torchrun) trap '' USR1 USR2 ;; esac  # srun would not get them at all
    [[ $LAUNCHER != deepspeed || ${#visible[@]} -eq 0 ]] || unset CUDA_VISIBLE_DEVICES  # it is told by name
    exec "${start[@]}" "$@"
}
set -m
begin "$@" &
group=$! pass_on=USR1 repeat='' code=0
for signal in INT TERM HUP USR1 USR2; do
    # shellcheck disable=SC2064  # the name is of now
    trap "stop ${signal/HUP/TERM}" $signal
done
[[ -z $asked ]] || stop "$asked"
wait $group || code=$?
while kill -0 $group 2>/dev/null; do code=0; wait $group || code=$?; done
[[ -z $repeat ]] || kill -- "-$repeat"
exit $code
# shellcheck disable=SC2317  # the here-document hides the Python part from bash
: <<'pass'
'''
import os
import sys
from pathlib import Path

if os.environ.get("LONGPRETRAIN_NO_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).resolve().parent))

if __name__ == "__main__":
    from longpretrain.cli import main
    from longpretrain.terminal import leave

    arguments = [a for a in sys.argv[1:] if not a.startswith(("--local_rank=", "--local-rank="))]
    leave(main(["train", *arguments]))
pass
