#!/usr/bin/env bash
''':'
# launch.sh RECIPE [key=value ...] [--fresh] [--dry-run]    starts all ranks of `longpretrain train`
#   RANKS=2           how many (default: one per GPU; one without GPUs; in a Slurm allocation its tasks)
#   LAUNCHER=...      deepspeed (default), torchrun, mpirun, srun (default in a Slurm allocation)
#   MASTER_PORT=...   where ranks meet (default: a free port)
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
    exec python -u "$here/launch.sh" "$@"
done

gpus=$(nvidia-smi -L 2>/dev/null | wc -l || true)
[[ $gpus -gt 0 ]] || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
LAUNCHER=${LAUNCHER:-$([[ -n ${SLURM_JOB_ID:-} ]] && echo srun || echo deepspeed)}
[[ $LAUNCHER != srun ]] || RANKS=${RANKS:-${SLURM_NTASKS:-1}}
RANKS=${RANKS:-$((gpus > 0 ? gpus : 1))}
[[ $RANKS =~ ^[1-9][0-9]*$ ]] || { echo "launch.sh: RANKS: got $RANKS; wanted 1 or more. Set it, or leave it out." >&2; exit 2; }
export LONGPRETRAIN_WORLD_SIZE=$RANKS
threads=${SLURM_CPUS_PER_TASK:-$(($(nproc) > RANKS ? $(nproc) / RANKS : 1))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}
port=${MASTER_PORT:-$(python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
case $LAUNCHER in
    deepspeed) start=(deepspeed --quiet --num_accelerators "$RANKS" --master_port "$port" "$here/launch.sh") ;;
    torchrun) start=(torchrun --nproc-per-node "$RANKS" --master-port "$port" "$here/launch.sh") ;;
    mpirun) start=(mpirun -n "$RANKS" "$here/launch.sh") ;;
    srun) start=(srun "${overlap[@]}" --kill-on-bad-exit=1 --ntasks "$RANKS" "$here/launch.sh") ;;
    *) echo "launch.sh: LAUNCHER: got $LAUNCHER; wanted deepspeed, torchrun, mpirun or srun. Choose one, or leave it out." >&2; exit 2 ;;
esac
if [[ " $* " == *" --dry-run "* ]]; then
    printf '%q ' "${start[@]}" "$@"; echo
    exec python -m longpretrain train "$@"
fi
python -m longpretrain train --check "$@" || exit
export LONGPRETRAIN_LAUNCHER=$LAUNCHER

# deepspeed and torchrun die of USR1 and kill their ranks at TERM: there, what asks to stop goes to the
# ranks alone, which then leave a checkpoint. All of them are in a process group of their own. mpirun and
# srun pass USR1 on, but may kill at INT and TERM: they get INT for a second Ctrl-C only.
set -m
"${start[@]}" "$@" &
group=$!
rank="-u ${here//[^[:alnum:]\/_-]/.}/launch\.sh"
pass_on=USR1
# shellcheck disable=SC2329  # the traps call it
stop() {
    case $LAUNCHER in
        deepspeed) pkill "-$1" -g "$group" -f -- "$rank" || kill -TERM -- "-$group" ;;
        torchrun) pkill "-$1" -P "$group" -f -- "$rank" || kill -TERM "$group" ;;
        *) kill "-$pass_on" "$group" ;;
    esac
    [[ $1 != INT ]] || pass_on=INT
}
trap 'stop INT' INT
trap 'stop TERM' TERM HUP
trap 'stop USR1' USR1
code=0
wait $group || code=$?
while kill -0 $group 2>/dev/null; do code=0; wait $group || code=$?; done
exit $code
# shellcheck disable=SC2317  # the here-document hides the Python part from bash
: <<'pass'
'''
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

if __name__ == "__main__":
    from longpretrain.cli import main
    from longpretrain.terminal import leave

    arguments = [a for a in sys.argv[1:] if not a.startswith(("--local_rank=", "--local-rank="))]
    leave(main(["train", *arguments]))
pass
