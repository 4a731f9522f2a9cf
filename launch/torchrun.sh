#!/usr/bin/env bash
# Starts pretraining with torchrun on one or several nodes. With several nodes, run the same line on each of them.
#
#   launch/torchrun.sh configs/gpt2_small.yaml --data.path '[data/openwebtext]'
#   NNODES=2 MASTER_ADDR=node0 launch/torchrun.sh configs/gpt2_small.yaml --data.path '[data/openwebtext]'
#
# Exit code: 0 done, 75 stopped on request with a saved checkpoint (run again to resume), else the code of the rank
# that failed first (docs/exit-codes.md); torchrun itself returns 1 for every failure.
set -u

NNODES=${NNODES:-1}                                  # nodes of this job
NPROC_PER_NODE=${NPROC_PER_NODE:-}                   # processes per node; empty: one per visible GPU, 2 without GPUs
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}                # a node that all others reach; the same on all nodes
MASTER_PORT=${MASTER_PORT:-29500}                    # a free port of MASTER_ADDR
JOB_ID=${JOB_ID:-megatron-lion}                      # the same on all nodes
PYTHON=${PYTHON:-}                                   # interpreter; empty: .venv/bin/python if it exists, else python3
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}   # Megatron's overlap needs kernels in launch order

here=$(cd "$(dirname "$0")/.." && pwd)
[ -n "$PYTHON" ] || { [ -x "$here/.venv/bin/python" ] && PYTHON=$here/.venv/bin/python || PYTHON=python3; }
if [ $# -lt 1 ]; then sed -n '2,8p' "$0" | sed 's/^# \{0,1\}//' >&2; exit 2; fi
config=$1; shift
if [ -z "$NPROC_PER_NODE" ]; then
    NPROC_PER_NODE=2
    # torch counts the GPUs, because nvidia-smi ignores CUDA_VISIBLE_DEVICES and lists MIG instances and their GPUs.
    # Importing torch takes seconds, so it is skipped on a machine without NVIDIA's driver.
    if [ -e /proc/driver/nvidia/version ] || [ -e /dev/nvidiactl ] || command -v nvidia-smi >/dev/null; then
        found=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null | tail -n 1)
        [ "$found" -gt 0 ] 2>/dev/null && NPROC_PER_NODE=$found
    fi
fi

# The settings are checked once here: an invalid one gives one message instead of one per process.
WORLD_SIZE=$((NNODES * NPROC_PER_NODE)) "$PYTHON" -m megatron_lion pretrain --config "$config" "$@" --dry-run >&2 || exit $?

MEGATRON_LION_EXIT_DIR=$(mktemp -d)
export MEGATRON_LION_EXIT_DIR
trap 'rm -rf "$MEGATRON_LION_EXIT_DIR"' EXIT
if [ "$NNODES" -gt 1 ]; then
    rendezvous=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "$JOB_ID")
else
    # Loopback and a free port: nothing outside this machine can reach the job, and jobs do not collide.
    rendezvous=(--nnodes 1 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 --local-addr 127.0.0.1)
fi
"$PYTHON" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node "$NPROC_PER_NODE" \
    -m megatron_lion pretrain --config "$config" "$@" &
agent=$!
# torchrun's agent dies from a USR1, which it does not handle; every stop signal reaches it as TERM.
forward() { kill -TERM "$agent" 2>/dev/null; }
trap forward TERM INT USR1
wait "$agent"; code=$?
# A trapped signal ends `wait` early: wait again until the agent has saved and ended.
while kill -0 "$agent" 2>/dev/null; do wait "$agent"; code=$?; done
if [ "$code" -ne 0 ]; then
    found=$("$PYTHON" -m megatron_lion.jobs first-exit-code "$MEGATRON_LION_EXIT_DIR")
    exit "${found:-$code}"
fi
