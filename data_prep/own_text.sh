#!/usr/bin/env bash
# Your own text as token files for a small GPT-2, with a tokenizer trained on it.
#
#   INPUT=book.txt data_prep/own_text.sh
#   INPUT="notes/ letters/*.jsonl.gz" TOKENIZER=my-vocabulary/ data_prep/own_text.sh
#
# The same command continues an interrupted preparation. In one command, with training: megatron-lion pretrain --text book.txt
set -euo pipefail

INPUT=${INPUT:-text}                     # files, folders or patterns, separated by spaces: .txt, .jsonl, .parquet
JSON_KEY=${JSON_KEY:-text}               # key (jsonl) or column (parquet) of the text
TXT_DOCUMENTS=${TXT_DOCUMENTS:-file}     # a .txt file is one document; blank-line: blank lines divide it into documents
DIVIDE=${DIVIDE:-auto}                   # auto: fewer documents than splits are divided by position; always; never
OUTPUT=${OUTPUT:-data/own}               # dataset folder to make
TOKENIZER=${TOKENIZER:-}                 # folder with vocab.json and merges.txt, or tokenizer.json; empty: train one on INPUT
VOCAB_SIZE=${VOCAB_SIZE:-2048}           # ids of the trained tokenizer: 2048 for a novel, 8192 for 10 MB
SPLIT=${SPLIT:-auto}                     # shares of train,valid,test, such as 90,5,5; auto: by the size of the text
SEED=${SEED:-1234}                       # seed of the hashes that determine a document's split
WORKERS=${WORKERS:-0}                    # number of processes; 0: one for each core
ON_ERROR=${ON_ERROR:-stop}               # at a bad line: stop and report it, or skip and count it
MORE=${MORE:-}                           # more flags of prepare, such as --deduplicate --min-tokens 50

here=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-$([ -x "$here/.venv/bin/python" ] && echo "$here/.venv/bin/python" || echo python3)}

# INPUT and MORE are not quoted: each word of INPUT is one input. set -f leaves patterns to prepare, because bash reads ** as *.
set -f
if [ -z "$TOKENIZER" ]; then
    TOKENIZER="$OUTPUT-tokenizer"
    # shellcheck disable=SC2086
    "$PYTHON" -m megatron_lion tokenizer train --input $INPUT --json-key "$JSON_KEY" --vocab-size "$VOCAB_SIZE" \
        --on-error "$ON_ERROR" --output "$TOKENIZER" >&2
fi
# shellcheck disable=SC2086
"$PYTHON" -m megatron_lion prepare --task gpt --input $INPUT --json-key "$JSON_KEY" --txt-documents "$TXT_DOCUMENTS" \
    --divide-documents "$DIVIDE" --tokenizer "$TOKENIZER" --output "$OUTPUT" --split "$SPLIT" --seed "$SEED" --workers "$WORKERS" \
    --on-error "$ON_ERROR" $MORE
echo "next: megatron-lion pretrain --config configs/gpt2_tiny.yaml --data.path '$OUTPUT' --dry-run" >&2
