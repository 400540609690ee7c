# shellcheck shell=bash disable=SC2034  # the scripts that read it use what it sets
# Facts of your cluster, and of no other place: where jobs go, modules, container, network. Edit this
# file. Every script of this folder and launch.sh (with sbatch or srun) read it before ranks start.

# Where jobs go, and what they get beside the #SBATCH lines of pretrain.sbatch. LAUNCHER=sbatch ./launch.sh
# gives them to sbatch. An sbatch that you type yourself, also of prepare.sbatch and evaluate.sbatch, does
# NOT read this file before the job runs: give partition and account as words, or once for all in your
# shell: export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=me
sbatch_options=(
    # --partition=gpu --account=me
    # --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 --time=24:00:00
)

# module load cuda/13.0                                 # if your cluster has modules

# A job is requeued after a preemption, at the end of its time, and after a crash; but it is given up
# when so many restarts in a row brought no new checkpoint. 0: a crash is the end.
export LONGPRETRAIN_MAX_RESTARTS=${LONGPRETRAIN_MAX_RESTARTS:-3}

# A container for the ranks: words that srun gets before ./launch.sh, cut at blanks. Both forms are
# written from the tools' manuals and have NOT been tried. The folder of the project, the runs and the
# data must have the same paths inside; .venv must be one made in that image (make setup), and its python
# must run outside, too: the batch script and launch.sh ask it a few things before and after the ranks.
# LONGPRETRAIN_CONTAINER="--container-image=$HOME/image.sqsh --container-mounts=$PWD:$PWD --container-workdir=$PWD"  # pyxis
# LONGPRETRAIN_CONTAINER="apptainer exec --nv --bind $PWD $HOME/image.sif"                                       # apptainer
# There is no scontrol in most images, and ranks ask it for the address of rank 0; say it here:
# [[ -z ${SLURM_JOB_NODELIST:-} ]] || { MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1); export MASTER_ADDR; }
LONGPRETRAIN_CONTAINER=${LONGPRETRAIN_CONTAINER:-}

# How srun speaks to MPI, for prepare.sbatch: pmi2 fits MPICH, which is in .venv (srun --mpi=list).
export LONGPRETRAIN_MPI=${LONGPRETRAIN_MPI:-pmi2}

# The network, if NCCL or gloo pick another than the fast one.
# export NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5 GLOO_SOCKET_IFNAME=ib0

# srun does not take it from sbatch by itself.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
