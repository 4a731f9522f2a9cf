#!/usr/bin/env bash
# OpenWebText as GPT-2 token files: data/openwebtext/{train,valid,test}_text_document.{bin,idx} and manifest.json.
#
#   data_prep/openwebtext.sh                                      # with the values below
#   INPUT=downloads/owt OUTPUT=/scratch/owt data_prep/openwebtext.sh
#
# The same command continues an interrupted preparation. docs/data.md describes every option.
set -euo pipefail

INPUT=${INPUT:-openwebtext}              # files, folders or patterns, separated by spaces: .tar.xz, .tar, .jsonl.zst, .txt, .parquet, …
JSON_KEY=${JSON_KEY:-text}               # key (jsonl) or column (parquet) of the text
TOKENIZER=${TOKENIZER:-gpt2}             # folder with GPT-2's vocab.json and merges.txt
OUTPUT=${OUTPUT:-data/openwebtext}       # dataset folder to make
SPLIT=${SPLIT:-99.9,0.05,0.05}           # shares of documents: training, validation, test
SEED=${SEED:-1234}                       # seed of the hashes that determine a document's split
WORKERS=${WORKERS:-0}                    # number of processes; 0: one for each core
ON_ERROR=${ON_ERROR:-stop}               # at a bad line: stop and report it, or skip and count it
MORE=${MORE:-}                           # more flags of prepare, such as --deduplicate --decontaminate wiki.test.tokens

here=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-$([ -x "$here/.venv/bin/python" ] && echo "$here/.venv/bin/python" || echo python3)}

# INPUT and MORE are not quoted: each word of INPUT is one input. set -f leaves patterns to prepare, because bash reads ** as *.
set -f
# shellcheck disable=SC2086
"$PYTHON" -m megatron_lion prepare --task gpt --input $INPUT --json-key "$JSON_KEY" --tokenizer "$TOKENIZER" --output "$OUTPUT" \
    --split "$SPLIT" --seed "$SEED" --workers "$WORKERS" --on-error "$ON_ERROR" $MORE
echo "next: launch/torchrun.sh configs/gpt2_small.yaml --data.path '[$OUTPUT]' --dry-run" >&2
