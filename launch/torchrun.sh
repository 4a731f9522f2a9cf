#!/usr/bin/env bash
# Starts pretraining on one or several nodes with torchrun. On several nodes run the same line on each of them.
#
#   launch/torchrun.sh configs/gpt2_small.yaml --data.path '[data/openwebtext]'
#   NNODES=2 MASTER_ADDR=node0 launch/torchrun.sh configs/gpt2_small.yaml --data.path '[data/openwebtext]'
#
# Exit code: 0 done, 75 stopped on request with a saved checkpoint (start again to resume), else the code of the rank
# that failed first (docs/exit-codes.md) instead of torchrun's 1 for everything.
set -u

NNODES=${NNODES:-1}                                  # nodes of this job
NPROC_PER_NODE=${NPROC_PER_NODE:-}                   # processes a node; empty: one a visible GPU, 2 without GPUs
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}                # a node that all others reach, the same everywhere
MASTER_PORT=${MASTER_PORT:-29500}                    # a free port there
JOB_ID=${JOB_ID:-megatron-lion}                      # the same everywhere
PYTHON=${PYTHON:-}                                   # interpreter; empty: .venv/bin/python if there is one
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}   # Megatron orders its overlap by it

here=$(cd "$(dirname "$0")/.." && pwd)
[ -n "$PYTHON" ] || { [ -x "$here/.venv/bin/python" ] && PYTHON=$here/.venv/bin/python || PYTHON=python3; }
if [ $# -lt 1 ]; then sed -n '2,8p' "$0" | sed 's/^# \{0,1\}//' >&2; exit 2; fi
config=$1; shift
if [ -z "$NPROC_PER_NODE" ]; then
    NPROC_PER_NODE=2
    # torch counts, because nvidia-smi ignores CUDA_VISIBLE_DEVICES and lists MIG instances beside their GPUs. Importing
    # torch takes seconds, so it is not asked on a machine without NVIDIA's driver.
    if [ -e /proc/driver/nvidia/version ] || [ -e /dev/nvidiactl ] || command -v nvidia-smi >/dev/null; then
        found=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null | tail -n 1)
        [ "$found" -gt 0 ] 2>/dev/null && NPROC_PER_NODE=$found
    fi
fi

# Settings are checked here once: a wrong one gives one line instead of one a process.
WORLD_SIZE=$((NNODES * NPROC_PER_NODE)) "$PYTHON" -m megatron_lion pretrain --config "$config" "$@" --dry-run >&2 || exit $?

MEGATRON_LION_EXIT_DIR=$(mktemp -d)
export MEGATRON_LION_EXIT_DIR
trap 'rm -rf "$MEGATRON_LION_EXIT_DIR"' EXIT
if [ "$NNODES" -gt 1 ]; then
    rendezvous=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "$JOB_ID")
else
    rendezvous=(--nnodes 1 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 --local-addr 127.0.0.1)
fi
"$PYTHON" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node "$NPROC_PER_NODE" \
    -m megatron_lion pretrain --config "$config" "$@" &
agent=$!
forward() { kill -TERM "$agent" 2>/dev/null; }
trap forward TERM INT USR1
wait "$agent"; code=$?
while kill -0 "$agent" 2>/dev/null; do wait "$agent"; code=$?; done
if [ "$code" -ne 0 ]; then
    found=$("$PYTHON" -m megatron_lion.jobs first-exit-code "$MEGATRON_LION_EXIT_DIR")
    exit "${found:-$code}"
fi
