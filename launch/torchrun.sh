#!/usr/bin/env bash
# Starts pretraining on one or several nodes. With several nodes, run the same line on each of them.
#
#   launch/torchrun.sh configs/gpt2_small.yaml --data.path '[data/openwebtext]'
#   NNODES=2 MASTER_ADDR=10.0.0.1 JOB_ID=$SECRET launch/torchrun.sh configs/gpt2_small.yaml --data.path '[data/openwebtext]'
#
# Exit code: 0 done, 75 stopped on request with a saved checkpoint (run again to resume), else that of the rank which
# failed first (docs/exit-codes.md). docs/launching.md describes the variables and what a signal does.
set -u

NNODES=${NNODES:-1}                                  # nodes of this job
NPROC_PER_NODE=${NPROC_PER_NODE:-0}                  # processes per node; 0: one per visible GPU, 2 without GPUs
# Several nodes need three more variables, the same on all nodes. The network between them must be closed to others.
#   MASTER_ADDR   an address of one node, which all others reach; the job listens on that address only
#   MASTER_PORT   a free port of it (29500)
#   JOB_ID        a random word, made once; SLURM's job id under SLURM
# INTERFACE       network interface for gloo and NCCL; without it the one through which this node reaches MASTER_ADDR
# STOP_TIMEOUT    seconds in which a stopped job must have saved, else it is killed (1800)
PYTHON=${PYTHON:-}                                   # interpreter; empty: .venv/bin/python if it exists, else python3
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}   # Megatron's overlap needs kernels in launch order

here=$(cd "$(dirname "$0")/.." && pwd)
[ -n "$PYTHON" ] || { [ -x "$here/.venv/bin/python" ] && PYTHON=$here/.venv/bin/python || PYTHON=python3; }
if [ $# -lt 1 ]; then sed -n '2,8p' "$0" | sed 's/^# \{0,1\}//' >&2; exit 2; fi
config=$1; shift
# exec: the launcher takes this script's place and pid, so a signal to the script reaches the launcher.
exec "$PYTHON" -m megatron_lion.launcher --nodes "$NNODES" --processes "$NPROC_PER_NODE" --check pretrain --config "$config" "$@"
