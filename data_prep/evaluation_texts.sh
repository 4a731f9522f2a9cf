#!/usr/bin/env bash
# WikiText-103 and LAMBADA for `megatron-lion evaluate`: checks that the files are the published ones and copies them
# into one folder. Evaluation reads the text, so no token files are made.
#
#   WIKITEXT=downloads/wiki.test.tokens LAMBADA=downloads/lambada_test.jsonl data_prep/evaluation_texts.sh
#
# wiki.test.tokens is in the archive wikitext-103-v1.zip, wiki.test.raw in wikitext-103-raw-v1.zip. lambada_test.jsonl is
# the set as processed by OpenAI.
set -euo pipefail

WIKITEXT=${WIKITEXT-wiki.test.tokens}   # wiki.test.tokens or wiki.test.raw; empty: skip it
LAMBADA=${LAMBADA-lambada_test.jsonl}   # empty: skip it
OUTPUT=${OUTPUT:-data/evaluation}        # folder for both

here=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-$([ -x "$here/.venv/bin/python" ] && echo "$here/.venv/bin/python" || echo python3)}

mkdir -p "$OUTPUT"
words=()
for file in ${WIKITEXT:+"$WIKITEXT"} ${LAMBADA:+"$LAMBADA"}; do
    "$PYTHON" -m megatron_lion.evaluate.known_texts "$file" || exit $?
    # Copied under a temporary name and renamed, so that an interrupted copy leaves no partial text.
    cp "$file" "$OUTPUT/.$(basename "$file").tmp"
    mv "$OUTPUT/.$(basename "$file").tmp" "$OUTPUT/$(basename "$file")"
done
[ -z "$WIKITEXT" ] || words+=(--wikitext103 "$OUTPUT/$(basename "$WIKITEXT")")
[ -z "$LAMBADA" ] || words+=(--lambada "$OUTPUT/$(basename "$LAMBADA")")
echo "next: megatron-lion evaluate RUN --steps all ${words[*]}" >&2
