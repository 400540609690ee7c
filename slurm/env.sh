# shellcheck shell=bash
# Facts of your cluster, and of no other place: partition, account, modules, network. Edit this file.
# It is read by every script of this folder before ranks start.

# module load cuda/13.0                    # if your cluster has modules
# export NCCL_SOCKET_IFNAME=ib0            # the fast network's interface, if NCCL picks another
export NCCL_ASYNC_ERROR_HANDLING=1         # a dead peer ends the job instead of hanging it
