#!/usr/bin/env bash
# Your own text as token files for a small GPT-2.
#
#   INPUT=notes/ data_prep/own_text.sh
#   INPUT="notes/ letters/*.jsonl.gz" TOKENIZER=my-vocabulary/ data_prep/own_text.sh
#
# The same command continues an interrupted preparation.
set -euo pipefail

INPUT=${INPUT:-text}                     # files, folders or patterns, separated by spaces: .txt, .jsonl, .parquet
JSON_KEY=${JSON_KEY:-text}               # key (jsonl) or column (parquet) of the text
TXT_DOCUMENTS=${TXT_DOCUMENTS:-blank-line}  # blank lines divide a .txt file into documents; file: a .txt file is one document
OUTPUT=${OUTPUT:-data/own}               # dataset folder to make
TOKENIZER=${TOKENIZER:-gpt2}             # folder with vocab.json and merges.txt, or tokenizer.json
SPLIT=${SPLIT:-90,5,5}                   # shares of documents: training, validation, test
SEED=${SEED:-1234}                       # seed of the hashes that determine a document's split
WORKERS=${WORKERS:-0}                    # number of processes; 0: one for each core

here=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-$([ -x "$here/.venv/bin/python" ] && echo "$here/.venv/bin/python" || echo python3)}

# INPUT is not quoted: each of its words is one input. set -f leaves patterns to prepare, because bash reads ** as *.
set -f
# shellcheck disable=SC2086
"$PYTHON" -m megatron_lion prepare --task gpt --input $INPUT --json-key "$JSON_KEY" --txt-documents "$TXT_DOCUMENTS" \
    --tokenizer "$TOKENIZER" --output "$OUTPUT" --split "$SPLIT" --seed "$SEED" --workers "$WORKERS"
echo "next: megatron-lion pretrain --config configs/gpt2_tiny.yaml --data.path '[$OUTPUT]' --dry-run" >&2
