#!/usr/bin/env bash
# WikiText-103 and LAMBADA for `megatron-lion evaluate`: checks that the files are the published ones and puts them
# into one folder. Evaluation reads the text itself, so that no token files are made.
#
#   WIKITEXT=downloads/wiki.test.tokens LAMBADA=downloads/lambada_test.jsonl data_prep/evaluation_texts.sh
#
# wiki.test.tokens is in the archive wikitext-103-v1.zip, wiki.test.raw in wikitext-103-raw-v1.zip; lambada_test.jsonl is
# the set as OpenAI processed it.
set -euo pipefail

WIKITEXT=${WIKITEXT-wiki.test.tokens}   # wiki.test.tokens or wiki.test.raw; empty: leave it out
LAMBADA=${LAMBADA-lambada_test.jsonl}   # empty: leave it out
OUTPUT=${OUTPUT:-data/evaluation}        # folder for both

here=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-$([ -x "$here/.venv/bin/python" ] && echo "$here/.venv/bin/python" || echo python3)}

mkdir -p "$OUTPUT"
words=()
for file in ${WIKITEXT:+"$WIKITEXT"} ${LAMBADA:+"$LAMBADA"}; do
    "$PYTHON" -m megatron_lion.evaluate.known_texts "$file" || exit $?
    cp "$file" "$OUTPUT/.$(basename "$file").tmp"
    mv "$OUTPUT/.$(basename "$file").tmp" "$OUTPUT/$(basename "$file")"
done
[ -z "$WIKITEXT" ] || words+=(--wikitext103 "$OUTPUT/$(basename "$WIKITEXT")")
[ -z "$LAMBADA" ] || words+=(--lambada "$OUTPUT/$(basename "$LAMBADA")")
echo "next: megatron-lion evaluate RUN --steps all ${words[*]}" >&2
