"""Compares the speed of `megatron-lion prepare --task bert` and its parts with NLTK's Punkt and `tokenizers`.

    python benchmarks/bert_prepare_throughput.py --input FILE… --vocab vocab.txt --punkt MODEL [--output benchmarks/results/NAME]

The baseline works like Megatron-LM's preprocess_data with --split-sentences: json.loads, Punkt, BertWordPiece on one sentence
at a time, IndexedDatasetBuilder. A second baseline replaces Punkt by our rules; its tokens must equal those of `prepare` byte
for byte. All are measured in one run. MB are 10^6 bytes of UTF-8 text per second of processor time, on one core. MODEL as for
sentence_splitters.py. The input is JSON lines with a `text` field.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path

from sentence_splitters import load_punkt

os.environ["TOKENIZERS_PARALLELISM"] = "false"


def seconds_of(work: Callable[[], object]) -> float:
    """Processor time of a call in seconds."""
    began = sum(os.times()[:4])  # with ended children
    work()
    return sum(os.times()[:4]) - began


def as_megatron_does(texts: Iterable[str], split: Callable[[str], Sequence[str]], vocab: Path, prefix: Path) -> None:
    """Writes one document after the other to .bin/.idx."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    from megatron_lion.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(vocab)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
    for text in texts:
        sentences = [ids for ids in map(tokenizer.encode, split(text)) if ids]
        if sentences:
            flat = torch.tensor([index for ids in sentences for index in ids], dtype=torch.int64)
            builder.add_document(flat, [len(ids) for ids in sentences])
    builder.finalize(f"{prefix}.idx")


def measure(files: list[Path], vocab: Path, model: Path) -> dict[str, object]:
    """Measures all parts and whole pipelines; exits if the tokens differ."""
    from megatron_lion.data.tokenizers import load_tokenizer
    from megatron_lion.prepare.options import PrepareOptions
    from megatron_lion.prepare.pipeline import prepare
    from megatron_lion.prepare.sentence_encoder import SentenceEncoder
    from megatron_lion.prepare.sentences import split_sentences

    punkt = load_punkt(model)
    texts = [json.loads(line)["text"] for path in files for line in path.read_text("utf-8").split("\n") if line.strip()]
    size = sum(len(text.encode()) for text in texts)
    tokenizer = load_tokenizer(vocab)
    by_words = SentenceEncoder(tokenizer)
    ours = [split_sentences(text) for text in texts]
    found: dict[str, float] = {
        "splitter: Punkt": seconds_of(lambda: [punkt.tokenize(text) for text in texts]),
        "splitter: rules": seconds_of(lambda: [split_sentences(text) for text in texts]),
        "WordPiece: tokenizers, a sentence a call": seconds_of(
            lambda: [list(map(tokenizer.encode, each)) for each in ours]
        ),
        "WordPiece: tokenizers, a document a call": seconds_of(lambda: [tokenizer.encode_batch(each) for each in ours]),
        "WordPiece: by words": seconds_of(lambda: [by_words._by_words(each) for each in ours]),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found["whole: Punkt + tokenizers, as Megatron-LM"] = seconds_of(
            lambda: as_megatron_does(texts, punkt.tokenize, vocab, folder / "punkt")
        )
        found["whole: rules + tokenizers"] = seconds_of(
            lambda: as_megatron_does(texts, split_sentences, vocab, folder / "rules")
        )
        options = PrepareOptions(
            inputs=files, tokenizer=vocab, output=folder / "data", split="1", workers=1, task="bert"
        )
        found["whole: prepare --task bert (hashing and reading included)"] = seconds_of(lambda: prepare(options))
        if (folder / "rules.bin").read_bytes() != (folder / "data" / "train_text_sentence.bin").read_bytes():
            sys.exit("prepare's tokens differ from those of the rules with tokenizers")
    base = {
        "splitter": "splitter: Punkt",
        "WordPiece": "WordPiece: tokenizers, a sentence a call",
        "whole": "whole: Punkt + tokenizers, as Megatron-LM",
    }
    rows = [
        {
            "what": what,
            "mb_per_core_s": round(size / 1e6 / seconds, 2),
            "ratio": round(found[base[what.split(":")[0]]] / seconds, 2),
        }
        for what, seconds in found.items()
    ]
    return {
        "date": date.today().isoformat(), "machine": f"{os.cpu_count()} cores, {platform.machine()}", "python": platform.python_version(),
        "documents": len(texts), "text_bytes": size, "tokens_byte_identical": True, "rows": rows,
        "load_average_1min_at_end": round(os.getloadavg()[0], 2),
    }  # fmt: skip


def as_markdown(result: dict[str, object]) -> str:
    """The results as a Markdown table."""
    from megatron_lion.compare.table import markdown_grid

    megabytes = int(str(result["text_bytes"])) / 1e6
    head = (
        f"{result['documents']:,} documents, {megabytes:.1f} MB of text; {result['machine']}, Python {result['python']}, "
        f"{result['date']}; load average {result['load_average_1min_at_end']} at the end. Processor time of one core.\n\n"
    )
    rows: list[dict[str, object]] = result["rows"]
    cells = [[str(row[key]) for key in ("what", "mb_per_core_s", "ratio")] for row in rows]
    return head + markdown_grid(["", "MB per core-second", "times the first of its kind"], cells, "lrr") + "\n"


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True)
    parser.add_argument("--vocab", type=Path, required=True)
    parser.add_argument("--punkt", type=Path, required=True)
    parser.add_argument("--output", type=Path, help="path without ending; .json and .md are written")
    args = parser.parse_args()
    result = measure(args.input, args.vocab, args.punkt)
    print(as_markdown(result))
    if args.output:
        args.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        args.output.with_suffix(".md").write_text(as_markdown(result), encoding="utf-8")


if __name__ == "__main__":
    main()
