# shellcheck shell=bash
# Facts of your cluster, and of no other place: partition, account, modules, network. Edit this file.
# It is read by every script of this folder before ranks start.

# module load cuda/13.0                    # if your cluster has modules
# export NCCL_SOCKET_IFNAME=ib0            # the fast network's interface, if NCCL picks another
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}   # srun does not take it from sbatch by itself
