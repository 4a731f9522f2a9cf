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

[ -n "$WIKITEXT$LAMBADA" ] || { echo "give WIKITEXT or LAMBADA, the path of the downloaded file" >&2; exit 2; }
mkdir -p "$OUTPUT"
words=()
take() {   # KIND FILE: checks the file, copies it, and adds its flag of `evaluate` to the words
    [ -n "$2" ] || return 0
    "$PYTHON" -m megatron_lion.evaluate.known_texts "$1" "$2"
    cp "$2" "$OUTPUT/.$(basename "$2").tmp"
    mv "$OUTPUT/.$(basename "$2").tmp" "$OUTPUT/$(basename "$2")"
    words+=("--$1" "$OUTPUT/$(basename "$2")")
}
take wikitext103 "$WIKITEXT"
take lambada "$LAMBADA"
printf 'next: megatron-lion evaluate RUN --steps all%s\n' "$(printf ' %q' "${words[@]}")" >&2
